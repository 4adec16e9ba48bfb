"""The restart methods: what each does to the model and to the optimizer's state.

    merge_and_reinit    ReLoRA (arXiv 2307.05695): W += scale * (A @ B), A redrawn, B = 0, moments pruned

No array may change its shape or type: the state is sharded, donated and saved as it was.
"""

from typing import Any, ClassVar

from relora_jax.core import grammar
from relora_jax.core.low_rank import merge_and_reinit
from relora_jax.core.reset import reset


class Restart(grammar.Choice):
    """One method. Another one is a class with `kind`, `model` and `opt_state`, and a row in CHOICES."""

    def model(self, model: Any, *, key: Any) -> Any:
        """At each merge: the model, which computes the same as before, with new factors; in place."""
        raise NotImplementedError

    def opt_state(self, opt_state: Any, *, key: Any) -> Any:
        """At each reset, which comes with the last merge of a cycle: the factors' statistics pruned."""
        raise NotImplementedError


class MergeAndReinit(Restart):
    """The factors are merged into their kernel and begin anew."""

    kind: ClassVar[str] = "merge_and_reinit"

    def model(self, model: Any, *, key: Any) -> Any:
        """`merge_and_reinit` of low_rank.py."""
        return merge_and_reinit(model, key=key)

    def opt_state(self, opt_state: Any, *, key: Any) -> Any:
        """`reset` of reset.py."""
        return reset(opt_state, key)


CHOICES: dict[str, type[Restart]] = {choice.kind: choice for choice in (MergeAndReinit,)}


def parse(text: object) -> Restart:
    """The method that `text` names. ValueError, with those that are known, otherwise."""
    return grammar.parse(text, CHOICES, what="restart")
