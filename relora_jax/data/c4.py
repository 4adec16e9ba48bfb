"""C4 as files of JSON lines -> the TFDS dataset `c4/en`: one ArrayRecord shard for each file.

A line is an object with `text`; `timestamp` and `url` are kept where they are there. Documents keep the
order of the files' names and of their lines; a file whose name says `validation` belongs to that split,
any other to train. Shards are written by processes beside each other into VERSION.partial, where finished
ones wait for the next command that reads their files; TFDS writes the metadata, without TensorFlow.
"""

import glob
import gzip
import hashlib
import io
import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from relora_jax.data import json_lines, workers
from relora_jax.errors import UserError
from relora_jax.storage import array_record, atomic, places

NAME, CONFIG, VERSION = "c4", "en", "3.1.0"
SPLITS = ("train", "validation")
FEATURES = ("text", "timestamp", "url")
NAMED = 3  # broken places of a file that are named; the others are counted
REPORTED = 500  # documents between two reports of a worker
FINISHED, NAMES = "finished", "names.json"  # in VERSION.partial: whole shards, what they become in the end
REMEDY = "mend or remove it, or give --skip_broken"


class Shard(NamedTuple):
    """What one file gave: documents, their bytes as examples, broken lines and where the first ones are."""

    documents: int
    bytes: int
    broken: int
    named: list[str]


class Advance(NamedTuple):
    """What a worker has done since it last said so: documents, bytes of its file, files that became whole."""

    documents: int
    bytes: int
    files: int = 0


def build(
    files: Sequence[Path], *, version: str, processes: int, skip_broken: bool
) -> tuple[Path, list[Shard]]:
    """The dataset's directory and a Shard for each file; a whole dataset is never written again.

    UserError names the first broken line as file:line unless `skip_broken`.
    """
    if not re.fullmatch(r"\d+\.\d+\.\d+", version):
        raise UserError(f"--version={version} is no version: write three numbers, such as {VERSION}")
    path = places.datasets_dir() / NAME / CONFIG / version
    if path.exists():
        raise UserError(f"{path} is there already: remove it, or give another --version")
    made: list[Shard] = []

    def make(aside: Path) -> None:
        (aside / FINISHED).mkdir(parents=True, exist_ok=True)
        for left in aside.rglob(atomic.ASIDE):
            left.unlink()
        _unname(aside)
        shards = {file: aside / FINISHED / _key(file) for file in files}
        _write_shards(shards, processes=processes, skip_broken=skip_broken)
        made.extend(_facts(shards[file]) for file in files)
        if not skip_broken:  # what an earlier command with it skipped
            for place in [place for shard in made for place in shard.named]:
                raise UserError(f"{place}: {REMEDY}")
        _name(aside, {shards[file].name: name for file, name in _names(files).items()})
        _write_metadata(aside, dict(zip(files, made, strict=True)), version)

    atomic.make_once(path, make, variable="TFDS_DATA_DIR", resume=True)
    atomic.remove(path / FINISHED)
    return path, made


def find(pattern: str) -> list[Path]:
    """The files of a pattern, by name."""
    found = {Path(name) for name in glob.glob(os.path.expanduser(pattern), recursive=True)}
    files = sorted(file for file in found if file.is_file())
    if not files:
        raise UserError(f"no file is named --input={pattern}: write a pattern such as 'c4/c4-*.json.gz'")
    return files


def _split(file: Path) -> str:
    return "validation" if "validation" in file.name else "train"


def _key(file: Path) -> str:
    """The name of a file's shard while others are missing: another for a file that was mended or replaced."""
    facts = file.stat()
    told = [os.path.abspath(file), facts.st_size, facts.st_mtime_ns]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:32]


def _names(files: Sequence[Path]) -> dict[Path, str]:
    """The name that TFDS gives the shard of each file, split by split."""
    names = {}
    for split in SPLITS:
        of_split = [file for file in files if _split(file) == split]
        for number, file in enumerate(of_split):
            names[file] = f"{NAME}-{split}.array_record-{number:05d}-of-{len(of_split):05d}"
    return names


def _name(aside: Path, names: dict[str, str]) -> None:
    """Gives finished shards their last names, having noted which, for a kill between two of them."""
    atomic.write(aside / FINISHED / NAMES, json.dumps(names).encode())
    for key, name in names.items():
        (aside / FINISHED / key).rename(aside / name)


def _unname(aside: Path) -> None:
    """Takes the names back that a killed command gave: the files may be others now."""
    noted = aside / FINISHED / NAMES
    if noted.exists():
        for key, name in json.loads(noted.read_text()).items():
            if (aside / name).exists():
                (aside / name).rename(aside / FINISHED / key)
        noted.unlink()


def _write_shards(shards: dict[Path, Path], *, processes: int, skip_broken: bool) -> None:
    """Every shard that is not there yet, by so many processes; a bar tells how far they are."""
    sizes = {file: file.stat().st_size for file in shards}
    left = [(file, target) for file, target in shards.items() if not target.exists()]
    done = sum(sizes.values()) - sum(sizes[file] for file, _ in left)
    documents, whole = 0, len(shards) - len(left)
    bar = tqdm(
        total=sum(sizes.values()),
        initial=done,
        unit="B",
        unit_scale=True,
        smoothing=0,
        dynamic_ncols=True,
        disable=None,  # drawn at a terminal alone
    )
    with bar, closing(workers.run(partial(_convert, skip_broken), left, processes)) as messages:
        for message in messages:
            documents, whole = documents + message.documents, whole + message.files
            speed = documents / (bar.format_dict["elapsed"] or 1)
            bar.set_postfix_str(f"{whole}/{len(shards)} files, {speed:,.0f} documents/s", refresh=False)
            bar.update(message.bytes)


def _convert(skip_broken: bool, task: tuple[Path, Path]) -> Iterator[Advance]:
    """Writes the documents of a file to its shard, which is there only when it is whole."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.example_serializer import ExampleSerializer

    file, target = task
    serializer = ExampleSerializer(_features(tfds).get_serialized_info())
    documents, size, broken, named, told = 0, 0, 0, [], Advance(0, 0)
    with file.open("rb") as raw, array_record.RecordWriter(target, "group_size:1") as writer:  # as TFDS does
        for line, found in _examples(file, raw):
            if isinstance(found, str):
                place = f"{file}:{line} is broken ({found})"
                if not skip_broken:
                    raise UserError(f"{place}: {REMEDY}")
                broken, named = broken + 1, [*named, place][:NAMED]
            else:
                example = serializer.serialize_example(found)
                writer.write(example)
                documents, size = documents + 1, size + len(example)
            if documents - told.documents == REPORTED:
                yield Advance(REPORTED, raw.tell() - told.bytes)
                told = Advance(documents, raw.tell())
        # before the shard has its name: it is never there without them
        atomic.write(_facts_file(target), json.dumps(Shard(documents, size, broken, named)).encode())
    yield Advance(documents - told.documents, file.stat().st_size - told.bytes, files=1)


def _examples(file: Path, raw: io.BufferedReader) -> Iterator[tuple[int, dict[str, bytes] | str]]:
    """(line, its features in UTF-8, or what is wrong with it); what cannot be unzipped is the last line."""
    try:
        for number, line in json_lines.lines(gzip.GzipFile(fileobj=raw) if file.suffix == ".gz" else raw):
            try:
                yield number, _example(line)
            except json_lines.Broken as error:
                yield number, str(error)
    except json_lines.Damaged as error:
        yield error.line, f"the file ends or is damaged here: {error}"


def _example(line: bytes) -> dict[str, bytes]:
    """The features of a line, empty where they are not there; `text` must be."""
    found = json_lines.parse(line)
    texts = {name: found.get(name, "") for name in FEATURES}
    if "text" not in found:
        raise json_lines.Broken("it has no `text`")
    if others := [name for name, text in texts.items() if not isinstance(text, str)]:
        raise json_lines.Broken(f"its `{others[0]}` is not a text")
    try:
        return {name: text.encode() for name, text in texts.items()}
    except UnicodeEncodeError as error:  # half of a surrogate pair, as JSON spells it
        raise json_lines.Broken(f"not UTF-8 ({error.reason})") from error


def _facts_file(target: Path) -> Path:
    return target.with_suffix(".json")


def _facts(target: Path) -> Shard:
    """What is known of a shard that is there."""
    return Shard(*json.loads(_facts_file(target).read_text()))


def _features(tfds: Any) -> Any:
    return tfds.features.FeaturesDict({name: tfds.features.Text() for name in FEATURES})


def _write_metadata(aside: Path, shards: dict[Path, Shard], version: str) -> None:
    """dataset_info.json and features.json in `aside`, by TFDS itself."""
    import tensorflow_datasets as tfds

    infos = []
    for split in SPLITS:
        made = [shard for file, shard in shards.items() if _split(file) == split]
        if made:
            template = tfds.core.ShardedFileTemplate(
                dataset_name=NAME,
                data_dir=aside,  # pyright: ignore
                split=split,
                filetype_suffix="array_record",
            )
            lengths, size = [shard.documents for shard in made], sum(shard.bytes for shard in made)
            infos.append(
                tfds.core.SplitInfo(
                    name=split, shard_lengths=lengths, num_bytes=size, filename_template=template
                )
            )
    tfds.folder_dataset.write_metadata(
        data_dir=aside, features=_features(tfds), split_infos=infos, version=version, check_data=False
    )
