"""The settings of a run, as typed dataclasses.

Fields marked RUN decide only how a run executes (speed, memory, cadence): a resumed run may change them. All
others decide the result: a run is not resumed under another value. Fields marked CONTENT are paths or names,
which may change as long as their content is the same. A field without a default must be set by every config.
`validate` (validate.py) checks the values.
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
MAX_CONSECUTIVE_SKIPS = 20  # skipped updates in a row that stop a run
SAMPLE_TEMPERATURE, SAMPLE_TOP_P = 1.0, 0.95  # for the samples at each evaluation
RUN: dict[str, Any] = {"decides": "run"}
CONTENT: dict[str, Any] = {"decides": "result, through its content"}  # compared by run/directory.py


def run_field(default: Any = dataclasses.MISSING) -> Any:
    """A field that decides how the run executes, not its result."""
    return dataclasses.field(default=default, metadata=RUN)


@dataclasses.dataclass(kw_only=True)
class ModelConfig:
    """The shape of the decoder and how it is computed.

    `family`: a row of families.py. `rope_scaling`: in the grammar of model/rope.py. `max_positions`:
    the longest row that an imported model supports (0: the run's own sequence_length); `sliding_window`: how
    many positions each of its ids attends to (0: all before it). Both are written to exports, and otherwise
    only upper bounds of the rows' length.
    """

    vocab_size: int
    hidden: int
    mlp: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    compute_dtype: str
    family: str = "llama"
    tied_embeddings: bool = False
    rope_theta: float = 1e4
    rope_scaling: str = "none"
    max_positions: int = run_field(0)
    sliding_window: int = run_field(0)
    rms_eps: float = 1e-6
    init_std: float = 0.02
    remat: str = run_field("auto")
    attention: str = run_field("auto")


@dataclasses.dataclass(kw_only=True)
class ReloraConfig:
    """The low-rank phase: its layers, its restarts and its learning rates.

    `base_dtype` and `restart`: in the grammars of core/base.py and core/restart.py. `base_master`: with
    "host", W is also kept in float32, in the hosts' memory: merges into fewer bits then lose nothing.
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
    base_master: str = "none"
    merges_per_cycle: int = 1
    restart: str = "merge_and_reinit"
    jagged: bool = True
    factor_lr_ratio: float = 1.0
    reset_count: bool = False


@dataclasses.dataclass(kw_only=True)
class OptimizerConfig:
    """The optimizer, and the cosine schedule of the full-rank updates.

    `name`: in the grammar of training/optimizers.py. `b1`, `b2` and `eps` are Adam's, in all of them.
    `kernel_lr_ratio`: the learning rate of the blocks' kernels that are trained in full rank, relative to
    that of the embeddings, the head and the norms.
    """

    peak_lr: float
    warm_up_updates: int
    kernel_lr_ratio: float = 1.0
    name: str = "adamw"
    min_lr_ratio: float = 0.1
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float = 1.0


@dataclasses.dataclass(kw_only=True)
class DataConfig:
    """The text (a TFDS dataset with a `text` feature, or your own files), the tokenizer and the packing.

    `text`, a path, directory, glob pattern or URL (data/patterns.py), replaces `dataset` if set; the formats
    are those of data/formats.py, and `text_field` is the field or column with the text (`outer.inner` for one
    inside another). `validation_text` names the held-out files; if empty, `validation_fraction` of the
    documents is held out. `tokenizer`: the path of a SentencePiece model, of a tokenizer.json or of a
    directory with one, the name of a model under the cache's `tokenizers/`, or "bpe(n)" / "unigram(n)", a
    model of n pieces trained on the train split. `eos_id` and `pad_id`: -1 takes the tokenizer's own;
    `bos_id` is put before each document unless it is -1.
    `train_tokens`: the rows end with the first block that reaches this many tokens (0: all text).
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
    """Counts and cadences in updates; `batch` and `microbatch` in rows over all devices.

    `init_from`: the workdir of a run whose full-rank checkpoint at relora.warm_start_updates this run starts
    from. `wandb`: the Weights & Biases project that also receives the metrics. `profile`: "START:STOP", the
    updates to trace with JAX's profiler.
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
    profile: str = run_field("")


@dataclasses.dataclass(kw_only=True)
class MeshConfig:
    """Devices along each axis of the mesh; data = -1 takes all remaining devices."""

    data: int = run_field(-1)
    fsdp: int = run_field(1)
    tensor: int = run_field(1)


@dataclasses.dataclass(kw_only=True)
class Config:
    """All settings of a run; `name` and `arm` also name its default workdir."""

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
        """W: the update that starts the low-rank phase; `train.updates` if the arm has none."""
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
    """UserError for the first value that does not have its field's type: config files are Python code."""
    for key, value, field in flatten(config):
        kind: Any = typing.get_origin(field.type) or field.type
        accepted = (int, float) if kind is float else kind
        if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
            raise UserError(f"{key} = {value!r} must be of type {kind.__name__}")


def to_json(config: Config) -> str:
    """The config as JSON, nested like the dataclasses, with the prune choice in its grammar."""
    groups = dataclasses.asdict(config)
    groups["relora"]["prune"] = str(config.relora.prune)
    return json.dumps(groups, indent=2) + "\n"


def from_json(text: str) -> Config:
    """The config that `to_json` wrote; UserError if the fields are not those of this version."""
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
        raise UserError(f"this version cannot read the saved config: {error}") from error


def changed_results(before: Config, after: Config) -> list[str]:
    """The fields that decide the result and differ, as "key: before -> after".

    The microbatch decides the result only with dropout, which draws a mask per microbatch.
    """
    changed, has_dropout = [], after.relora.dropout > 0 and after.arm in LOW_RANK_ARMS
    for (key, old, field), (_, new, _) in zip(flatten(before), flatten(after), strict=True):
        decides = field.metadata not in (RUN, CONTENT) or (key == "train.microbatch" and has_dropout)
        if decides and old != new:
            changed.append(f"{key}: {old} -> {new}")
    return changed
