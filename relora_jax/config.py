"""The settings of a run, as typed dataclasses; each field says what it decides.

A field marked RUN decides only how a run runs (speed, memory, cadence): a resumed run may change
it. Every other field decides the result: a run resumed under another value is refused. One marked CONTENT
is a place or a name, which may change where what it stands for is the same. Where a
field has no default, every config states it. `validate` (validate.py) judges the values.
"""

import dataclasses
import json
import typing
from collections.abc import Iterator
from typing import Any

from relora_jax.core.grammar import Choice
from relora_jax.core.prune import Prune, parse
from relora_jax.errors import UserError

ARMS = ("full", "control", "lora", "lora_warm", "relora")
LOW_RANK_ARMS = ("lora", "lora_warm", "relora")
SKIPS_IN_ROW = 20  # so many skipped updates, one after another, stop a run
SAMPLE_TEMPERATURE, SAMPLE_TOP_P = 1.0, 0.95  # of what a run writes at each evaluation
RUN: dict[str, Any] = {"decides": "run"}
CONTENT: dict[str, Any] = {"decides": "result, by what lies there"}  # compared by run/directory.py


def run_field(default: Any = dataclasses.MISSING) -> Any:
    """A field that decides only the run, not the result."""
    return dataclasses.field(default=default, metadata=RUN)


@dataclasses.dataclass(kw_only=True)
class ModelConfig:
    """The shape of the LLaMA decoder and how it is computed.

    `rope_scaling` is written as model/rope.py has it. `max_positions`: the longest row that the model is made
    for, as an imported one says it (0: that of its own rows); it decides what an export says, and no more.
    """

    vocab_size: int
    hidden: int
    mlp: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    compute_dtype: str
    tied_embeddings: bool = False
    rope_theta: float = 1e4
    rope_scaling: str = "none"
    max_positions: int = run_field(0)
    rms_eps: float = 1e-6
    init_std: float = 0.02
    remat: str = run_field("none")
    attention: str = run_field("xla")


@dataclasses.dataclass(kw_only=True)
class ReloraConfig:
    """The low-rank phase: its shape, its restarts and its rates.

    `base_dtype` and `restart` are written as core/base.py and core/restart.py have them.
    """

    product: str = run_field()
    base_dtype: str
    warm_start_updates: int
    cycle_updates: int
    warm_up_updates: int
    restart_warm_up_updates: int
    peak_lr: float
    prune: Prune
    rank: int = 128
    alpha: float = 32.0
    targets: tuple[str, ...] = ("attention", "mlp")
    dropout: float = 0.0
    base_init: str = "keep"
    merges_per_cycle: int = 1
    restart: str = "merge_and_reinit"
    jagged: bool = True
    factor_lr_ratio: float = 1.0
    reset_count: bool = False


@dataclasses.dataclass(kw_only=True)
class OptimizerConfig:
    """AdamW, and the cosine of the full-rank updates."""

    peak_lr: float
    warm_up_updates: int
    min_lr_ratio: float = 0.1
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float = 1.0


@dataclasses.dataclass(kw_only=True)
class DataConfig:
    """What is read: a TFDS dataset with a `text` feature or files of one's own, a tokenizer, a row's length.

    `text`, a glob pattern, is read in place of `dataset` where it is given: .jsonl, .txt or .parquet, the
    first two also .gz or .zst; `text_field` names the text of a line or of a column. `validation_text` names
    the files that are held out; where it is empty, `validation_fraction` of the documents is. `tokenizer` is
    the path of a SentencePiece model, of a tokenizer.json or of a directory with one, the name of a model
    under the cache's `tokenizers/`, or "bpe(n)" / "unigram(n)": a model of n pieces trained on the train
    split; `eos_id` and `pad_id` are its own where they are -1; `bos_id` begins each document, which nothing
    does where it is -1. `train_tokens`: the rows end with the first block that reaches so many (0: all).
    """

    dataset: str = dataclasses.field(default="", metadata=CONTENT)
    train_split: str = "train"
    validation_split: str = "validation"
    text: str = dataclasses.field(default="", metadata=CONTENT)
    text_field: str = "text"
    validation_text: str = dataclasses.field(default="", metadata=CONTENT)
    validation_fraction: float = 0.01
    train_tokens: int = 0
    tokenizer: str = dataclasses.field(metadata=CONTENT)
    eos_id: int = -1
    pad_id: int = -1
    bos_id: int = -1
    sequence_length: int
    packing: str = "concatenate"
    attend_across_documents: bool = True


@dataclasses.dataclass(kw_only=True)
class TrainConfig:
    """Counts and cadences in updates; `batch` and `microbatch` in sequences over all devices.

    `init_from`: the directory of a run whose full-rank checkpoint at relora.warm_start_updates this run
    begins with. `wandb`: the Weights & Biases project that metrics are sent to as well.
    """

    updates: int
    batch: int
    microbatch: int = run_field()
    log_every_updates: int = run_field()
    evaluate_every_updates: int = run_field()
    save_every_updates: int = run_field()
    eval_tokens: int = run_field()
    seed: int = 0
    keep_last: int = run_field(3)
    keep_every: int = run_field(0)
    init_from: str = ""
    wandb: str = run_field("")


@dataclasses.dataclass(kw_only=True)
class MeshConfig:
    """Devices along each axis of the mesh; data = -1 takes all that are left."""

    data: int = run_field(-1)
    fsdp: int = run_field(1)
    tensor: int = run_field(1)


@dataclasses.dataclass(kw_only=True)
class Config:
    """Everything that a run is made from; `name` and `arm` also name its default workdir."""

    name: str = run_field()
    arm: str
    model: ModelConfig
    relora: ReloraConfig
    optimizer: OptimizerConfig
    data: DataConfig
    train: TrainConfig
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)

    @property
    def low_rank_start(self) -> int:
        """W: the update that starts the low-rank phase; `updates` where there is none."""
        return self.relora.warm_start_updates if self.arm in LOW_RANK_ARMS else self.train.updates

    @property
    def accumulation(self) -> int:
        """Microbatches per update."""
        return self.train.batch // self.train.microbatch


def flatten(config: Any, prefix: str = "") -> Iterator[tuple[str, Any, dataclasses.Field[Any]]]:
    """(dotted key, value, field) of every leaf, in the order of the dataclasses."""
    for field in dataclasses.fields(config):
        key, value = f"{prefix}{field.name}", getattr(config, field.name)
        if dataclasses.is_dataclass(value) and not isinstance(value, Choice):
            yield from flatten(value, f"{key}.")
        else:
            yield key, value, field


def check_types(config: Config) -> None:
    """UserError for the first value that has not the type of its field: a config file is Python."""
    for key, value, field in flatten(config):
        kind: Any = typing.get_origin(field.type) or field.type
        wanted = (int, float) if kind is float else kind
        if not isinstance(value, wanted) or (isinstance(value, bool) and kind is not bool):
            raise UserError(f"{key} = {value!r} must be of the type {kind.__name__}")


def to_json(config: Config) -> str:
    """The config as JSON, nested like the dataclasses; a prune choice as its text."""
    groups = dataclasses.asdict(config)
    groups["relora"]["prune"] = str(config.relora.prune)
    return json.dumps(groups, indent=2) + "\n"


def from_json(text: str) -> Config:
    """The config that `to_json` wrote. UserError where the text holds other fields."""
    try:
        groups = json.loads(text)
        groups["relora"]["prune"] = parse(str(groups["relora"]["prune"]))
        groups["relora"]["targets"] = tuple(groups["relora"]["targets"])
        return Config(
            name=groups["name"],
            arm=groups["arm"],
            model=ModelConfig(**groups["model"]),
            relora=ReloraConfig(**groups["relora"]),
            optimizer=OptimizerConfig(**groups["optimizer"]),
            data=DataConfig(**groups["data"]),
            train=TrainConfig(**groups["train"]),
            mesh=MeshConfig(**groups["mesh"]),
        )
    except (KeyError, TypeError, AttributeError, RecursionError, ValueError) as error:
        raise UserError(f"a saved config that this version cannot read: {error}") from error


def changed_results(before: Config, now: Config) -> list[str]:
    """Keys whose values differ and decide the result, as "key: before -> now".

    The microbatch decides the result only where dropout draws a mask per microbatch.
    """
    changed, drops = [], now.relora.dropout > 0 and now.arm in LOW_RANK_ARMS
    for (key, old, field), (_, new, _) in zip(flatten(before), flatten(now), strict=True):
        decides = field.metadata not in (RUN, CONTENT) or (key == "train.microbatch" and drops)
        if decides and old != new:
            changed.append(f"{key}: {old} -> {new}")
    return changed
