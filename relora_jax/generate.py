"""Continuations of a prompt, drawn from what a run's model expects next.

    python -m relora_jax.generate --workdir=RUN [--prompt='My fellow citizens'] [--n=4] [--temperature=1.0]
                                  [--top_p=0.95] [--max_tokens=128] [--seed=0] [--update=U]
                                  [--tokenizer=PATH] [--json]

samples from the newest checkpoint of a run, or that of --update, in any phase. Without --prompt a document
begins. --temperature=0 takes the likeliest piece each time; --top_p=P draws from the fewest pieces alone
whose probabilities reach P. A sample ends with its document, with --max_tokens, or where the model's length
does. The same seed gives the same samples, and sample i does not depend on --n. --tokenizer: where the
run's own lies now, if it was moved. Nothing is written into RUN.
Exit codes: 0 done, 2 wrong usage or nothing there to sample from, 74 data or disk failed.
"""

import json
import sys
from argparse import ArgumentTypeError
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from relora_jax import cli
from relora_jax.config import DataConfig
from relora_jax.errors import UserError
from relora_jax.model.sampling import Request, in_text, windows
from relora_jax.run import restored
from relora_jax.tokenizer.tokenizer import Tokenizer
from relora_jax.training.program import Program, keep_compiled

MAX_TOKENS = 128  # where nothing is said
HOTTEST = 1e6  # all pieces are alike long before
AT_ONCE = 16  # samples; more are drawn one such group after another


def main(argv: Sequence[str]) -> int:
    """Prints the samples that the command line asks for; the exit code."""
    words = _parse(argv[1:])
    place = words.workdir.expanduser()
    config = restored.config_of(place)
    u, length = restored.update_of(place, words.update), config.data.sequence_length
    tokenizer = restored.tokenizer_of(place, config, words.tokenizer)
    prompt = prompt_ids(words.prompt, tokenizer, config.data)
    if len(prompt) > length:
        raise UserError(f"--prompt has {len(prompt)} tokens and the model's length is {length}: shorten it")
    room = length + 1 - len(prompt)  # the last position guesses one id more
    if words.max_tokens is None:
        words.max_tokens = min(MAX_TOKENS, room)
    elif words.max_tokens > room:
        print(
            f"note: after the prompt's {len(prompt)} tokens the model's length of {length} leaves {room} "
            f"of --max_tokens={words.max_tokens}: samples end there",
            file=sys.stderr,
        )
    keep_compiled()
    program = Program(config, restored.mesh_of(config))
    state = restored.model_of(place, u, config, program)
    about = {"workdir": str(place), "arm": config.arm, "update": u, "seed": words.seed}
    for asked in requests(prompt, words, tokenizer, length=length):
        rows = zip(asked.numbers, *map(np.asarray, program.sample(state, asked)), strict=True)
        for number, ids, end in [row for row in rows if row[0] < words.n]:
            before, text = in_text(tokenizer.decode, ids[:end], prompt=len(prompt))
            if words.json:
                ended = bool(ids[end - 1] == tokenizer.eos)
                found = {"prompt": words.prompt, "text": text, "tokens": int(end) - len(prompt)}
                print(json.dumps({**about, "sample": int(number), **found, "document_ended": ended}))
            else:
                print(f"--- {number + 1} of {words.n}, update {u} of {place}")
                print(_printable(f"[{before}]{text}"), flush=True)
    return 0


def prompt_ids(prompt: str, tokenizer: Tokenizer, data: DataConfig) -> list[int]:
    """The ids that a prompt is to the model; those of an empty one are bos, or the end of a document before.

    Where documents do not see each other, what follows an end begins anew, and what begins one was never
    learnt: UserError for a prompt that leaves nothing else.
    """
    begin = [] if tokenizer.bos is None else [tokenizer.bos]
    ids = begin + tokenizer.encode_documents([prompt])[0].tolist()
    if data.packing == "concatenate" and data.attend_across_documents:
        return ids or [tokenizer.eos]
    last = max((place for place, i in enumerate(ids) if i == tokenizer.eos), default=-1)
    if ids[last + 1 :]:
        return ids[last + 1 :]
    raise UserError(
        "this run's documents do not see each other, so that its model never learnt what one begins with: "
        "give the beginning as --prompt"
    )


def requests(prompt: list[int], words: Any, tokenizer: Tokenizer, *, length: int) -> Iterator[Request]:
    """What to ask of the program for the n samples, group by group; the last one is filled up."""
    size = min(words.n, AT_ONCE)
    ids, lengths = windows([prompt] * size, size=length + 1)
    for first in range(0, words.n, size):
        yield Request(
            ids=ids,
            lengths=lengths,
            numbers=np.arange(first, first + size, dtype=np.int32),
            seed=words.seed,
            max_tokens=min(words.max_tokens, length),
            temperature=words.temperature,
            top_p=words.top_p,
            vocab_size=tokenizer.vocab_size,
            eos=tokenizer.eos,
            pad=tokenizer.pad,
        )


def _parse(words: Sequence[str]) -> Any:
    parser = cli.Words()
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--prompt", default="", type=_utf8)
    parser.add_argument("--n", type=int, default=4)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--top_p", type=float, default=0.95)
    parser.add_argument("--max_tokens", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--update", type=int)
    parser.add_argument("--tokenizer", default="")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args(words)
    for name in ("n", "max_tokens"):
        if getattr(given, name) is not None and getattr(given, name) < 1:
            raise UserError(f"--{name}={getattr(given, name)} must be at least 1")
    if not 0 <= given.seed < 2**31:
        raise UserError(f"--seed={given.seed} must lie in [0, {2**31})")
    if not 0 <= given.temperature <= HOTTEST:
        raise UserError(f"--temperature={given.temperature} must lie in [0, {HOTTEST:g}], 0 the likeliest")
    if not 0 < given.top_p <= 1:
        raise UserError(f"--top_p={given.top_p} must lie in (0, 1]")
    return given


def _printable(text: str) -> str:
    """The text without what would move a terminal's cursor or change its colours."""
    return "".join(sign if sign.isprintable() or sign in "\n\t" else "\ufffd" for sign in text)


def _utf8(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ArgumentTypeError(f"{text!r} is not UTF-8") from None
    return text


if __name__ == "__main__":
    cli.main(main, __doc__)
