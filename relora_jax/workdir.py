"""A run's directory before and at its start: may it be used, and what is the run that it holds made of."""

import json
import os
import tempfile
from importlib.metadata import version
from pathlib import Path

import jax

from relora_jax import shapes
from relora_jax.checkpoint import updates_saved
from relora_jax.config import Config, changed_results, from_json, to_json

PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint")


def check(workdir: Path, config: Config) -> None:
    """ValueError where the run cannot live: another run, something else, no place to write. Writes nothing.

    A run without a checkpoint has nothing to lose: another config may begin anew in its place.
    """
    saved = workdir / "config.json"
    if saved.is_file():
        changed = changed_results(from_json(saved.read_text(encoding="utf-8")), config)
        if changed and updates_saved(workdir):
            raise ValueError(
                f"{workdir} holds a run of another config, which would change its result "
                f"({'; '.join(changed)}): set it back, or take another --workdir"
            )
    elif workdir.is_dir() and any(workdir.iterdir()):
        raise ValueError(f"workdir {str(workdir)!r} holds something else than a run: take a new one")
    there = next(path for path in (workdir, *workdir.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise ValueError(
            f"workdir {str(workdir)!r} cannot be written ({error.strerror}): take another --workdir"
        ) from None


def begin(workdir: Path, config: Config, *, unigram_perplexity: float) -> None:
    """Makes the directory, config.json and run.json: parameter counts, the unigram's perplexity, versions."""
    count = shapes.count(config)
    facts = {
        "trained": count.trained,
        "frozen": count.frozen,
        "full_rank_total": count.full_rank_total,
        "reduction_percent": count.reduction_percent,
        "unigram_perplexity": unigram_perplexity,
        "versions": {name: version(name) for name in PACKAGES},
        "devices": [str(device) for device in jax.devices()],
    }
    workdir.mkdir(parents=True, exist_ok=True)
    _write(workdir / "config.json", to_json(config))
    _write(workdir / "run.json", json.dumps(facts, indent=2) + "\n")


def _write(path: Path, text: str) -> None:
    """The whole text or the file as it was, also after a kill."""
    aside = path.with_suffix(".tmp")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)
