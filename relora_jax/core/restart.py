"""Restart methods: what each does to the model and to the optimizer's state.

    merge_and_reinit    ReLoRA (arXiv 2307.05695): W += scale * (A @ B), A redrawn, B = 0, moments pruned

A method must not change the shape or dtype of any array: the state is sharded, donated and saved as is.
"""

from typing import Any, ClassVar

from relora_jax.core import grammar
from relora_jax.core.low_rank import merge_and_reinit
from relora_jax.core.reset import reset


class Restart(grammar.Choice):
    """One method. To add one, subclass with `kind`, `model` and `opt_state`, and add it to CHOICES."""

    def model(self, model: Any, *, key: Any) -> Any:
        """Called at each merge: the model with new factors and unchanged outputs, updated in place."""
        raise NotImplementedError

    def opt_state(self, opt_state: Any, *, key: Any) -> Any:
        """Called at each reset (the last merge of a cycle): the state with the factors' statistics pruned."""
        raise NotImplementedError


class MergeAndReinit(Restart):
    """Merges the factors into the base kernel and reinitializes them."""

    kind: ClassVar[str] = "merge_and_reinit"

    def model(self, model: Any, *, key: Any) -> Any:
        """See `low_rank.merge_and_reinit`."""
        return merge_and_reinit(model, key=key)

    def opt_state(self, opt_state: Any, *, key: Any) -> Any:
        """See `reset.reset`."""
        return reset(opt_state, key)


CHOICES: dict[str, type[Restart]] = {choice.kind: choice for choice in (MergeAndReinit,)}


def parse(text: object) -> Restart:
    """The method that `text` names. ValueError, listing the valid ones, otherwise."""
    return grammar.parse(text, CHOICES, name="restart")
