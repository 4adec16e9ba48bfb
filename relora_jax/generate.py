"""Samples continuations of a prompt from a run's checkpoint, in any phase.

    python -m relora_jax.generate --workdir=RUN [--prompt='My fellow citizens'] [--FLAG=VALUE ...]

Nothing is written into RUN. A sample ends with its document (at any eos of an imported model that has
several) or, which a note says, at the model's length.

--prompt=TEXT       default: the beginning of a document
--n=4               the number of samples; sample i does not depend on it
--temperature=1.0   0 takes the most likely token each time
--top_p=0.95        draw from the fewest tokens whose probabilities sum to at least this
--max_tokens=128    the longest continuation
--seed=0            the same seed gives the same samples
--update=U          the checkpoint (default: the newest)
--tokenizer=PATH    the run's tokenizer, if it was moved
--json              print each sample as a line of JSON
--coordinator, --processes, --process, --heartbeat: as in `train`

Exit codes: 0 finished, 2 wrong usage or nothing to sample from, 74 data or disk failed.
"""

import json
from argparse import ArgumentTypeError
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from relora_jax import cli
from relora_jax.config import DataConfig
from relora_jax.errors import UserError
from relora_jax.model.sampling import Request, prompt_rows, split_text
from relora_jax.run import record, restored
from relora_jax.storage.location import AnyPath, any_path
from relora_jax.storage.writer import Writer
from relora_jax.tokenizer.tokenizer import Tokenizer
from relora_jax.training import processes
from relora_jax.training.program import Program, enable_compilation_cache

MAX_TOKENS = 128  # default
MAX_TEMPERATURE = 1e6  # long past the point where all tokens are equally likely
AT_ONCE = 16  # samples per group; groups are drawn one after another


def main(argv: Sequence[str]) -> int:
    """Prints the samples; returns the exit code."""
    args = _parse(argv[1:])
    with processes.joined(vars(args)):
        return _generate(args)


def _generate(args: Any) -> int:
    workdir = any_path(args.workdir)
    config, writer = restored.config_of(workdir), Writer(workdir, active=processes.is_writer())
    u, length = restored.update_of(workdir, args.update), config.data.sequence_length
    tokenizer = restored.tokenizer_of(workdir, config, args.tokenizer)
    prompt = prompt_ids(args.prompt, tokenizer, config.data)
    if len(prompt) > length:
        raise UserError(f"--prompt has {len(prompt)} tokens and the model's length is {length}: shorten it")
    room = length + 1 - len(prompt)  # the last position still predicts one more id
    is_cut = (args.max_tokens or MAX_TOKENS) > room
    if args.max_tokens is None:
        args.max_tokens = min(MAX_TOKENS, room)
    elif is_cut:
        writer.print(
            f"note: --max_tokens={args.max_tokens} is reduced to {room}: the prompt has {len(prompt)} tokens "
            f"and the model's length is {length}",
            warning=True,
        )
    enable_compilation_cache()
    program = Program(config, restored.mesh_of(config))
    state = restored.model_of(workdir, u, config, program)
    about = {"workdir": str(workdir), "arm": config.arm, "update": u, "seed": args.seed}
    ends, cut = ends_of(workdir, tokenizer), []
    for request in requests(prompt, args, tokenizer, ends, length=length):
        rows = zip(request.numbers, *map(np.asarray, program.sample(state, request)), strict=True)
        for number, ids, end in [row for row in rows if row[0] < args.n]:
            ended = int(ids[end - 1]) in ends
            before, text = split_text(tokenizer.decode, ids[: end - ended], prompt=len(prompt))
            if is_cut and end == length + 1 and not ended:
                cut.append(str(number + 1))
            if args.json:
                sample = {"prompt": args.prompt, "text": text, "tokens": int(end) - len(prompt)}
                writer.print(json.dumps({**about, "sample": int(number), **sample, "document_ended": ended}))
            else:
                writer.print(f"--- {number + 1} of {args.n}, update {u} of {workdir}")
                writer.print(_printable(f"[{before}]{text}"))
    if cut:
        writer.print(f"note: sample {', '.join(cut)} ended at the model's length, {length}", warning=True)
    return 0


def ends_of(workdir: AnyPath, tokenizer: Tokenizer) -> list[int]:
    """The ids that end a sample: the run's eos, and those of an imported model if it has several."""
    imported = record.read_facts(workdir).get("special", {}).get("eos_token_id")
    several = imported if isinstance(imported, list) else []
    return list(dict.fromkeys([tokenizer.eos, *several]))


def prompt_ids(prompt: str, tokenizer: Tokenizer, data: DataConfig) -> list[int]:
    """The ids that the model is given for a prompt; for an empty one bos, or the previous document's eos.

    If documents do not attend to each other, only the ids after the last eos count, and the model has not
    learned how a document begins: UserError if no ids remain.
    """
    begin = [] if tokenizer.bos is None else [tokenizer.bos]
    ids = begin + tokenizer.encode_documents([prompt])[0].tolist()
    if data.packing == "concatenate" and data.attend_across_documents:
        return ids or [tokenizer.eos]
    last = max((position for position, i in enumerate(ids) if i == tokenizer.eos), default=-1)
    if ids[last + 1 :]:
        return ids[last + 1 :]
    raise UserError(
        "the documents of this run do not attend to each other, so its model has not learned how one begins: "
        "pass the beginning as --prompt"
    )


def requests(
    prompt: list[int], args: Any, tokenizer: Tokenizer, ends: list[int], *, length: int
) -> Iterator[Request]:
    """The n samples in groups of equal size; the last group is padded with surplus samples."""
    size = min(args.n, AT_ONCE)
    ids, lengths = prompt_rows([prompt] * size, size=length + 1)
    for first in range(0, args.n, size):
        yield Request(
            ids=ids,
            lengths=lengths,
            numbers=np.arange(first, first + size, dtype=np.int32),
            seed=args.seed,
            max_tokens=min(args.max_tokens, length),
            temperature=args.temperature,
            top_p=args.top_p,
            vocab_size=tokenizer.vocab_size,
            eos=np.array(ends, np.int32),
            pad=tokenizer.pad,
        )


def _parse(args: Sequence[str]) -> Any:
    parser = cli.ArgumentParser()
    parser.add_argument("--workdir", required=True)
    parser.add_argument("--prompt", default="", type=_utf8)
    parser.add_argument("--n", type=int, default=4)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--top_p", type=float, default=0.95)
    parser.add_argument("--max_tokens", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--update", type=int)
    parser.add_argument("--tokenizer", default="")
    parser.add_argument("--json", action="store_true")
    for name, default in processes.FLAGS.items():
        parser.add_argument(f"--{name}", default=default)
    values = parser.parse_args(args)
    for name in ("n", "max_tokens"):
        if getattr(values, name) is not None and getattr(values, name) < 1:
            raise UserError(f"--{name}={getattr(values, name)} must be at least 1")
    if not 0 <= values.seed < 2**31:
        raise UserError(f"--seed={values.seed} must lie in [0, {2**31})")
    if not 0 <= values.temperature <= MAX_TEMPERATURE:
        raise UserError(
            f"--temperature={values.temperature} must lie in [0, {MAX_TEMPERATURE:g}]; 0 is greedy decoding"
        )
    if not 0 < values.top_p <= 1:
        raise UserError(f"--top_p={values.top_p} must lie in (0, 1]")
    return values


def _printable(text: str) -> str:
    """The text without characters that would move a terminal's cursor or change its colors."""
    return "".join(char if char.isprintable() or char in "\n\t" else "\ufffd" for char in text)


def _utf8(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ArgumentTypeError(f"{text!r} is not UTF-8") from None
    return text


if __name__ == "__main__":
    cli.main(main, __doc__, leave=processes.leave)
