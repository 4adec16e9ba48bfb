"""Restart methods: what each does to the model and to the optimizer's state.

    merge_and_reinit        ReLoRA (arXiv 2307.05695): W += scale * (A @ B), A redrawn, B = 0, moments pruned
    one_sided               RSO (arXiv 2502.07222): the same, but A ~ N(0, 1/r) is frozen, and B alone trained
    one_sided_orthonormal   the same with A of orthogonal columns
    merge_and_reinit_late   a mistake of published code, to measure it: A is 0 as B is, until the first merge
                            draws it, so that nothing trains the factors before

A method must not change the shape or dtype of any array: the state is sharded, donated and saved as is.
JAX is imported only where a method is carried out: commands that read or report settings do without it.
"""

from typing import Any, ClassVar

from relora_jax.core import grammar


class Restart(grammar.Choice):
    """One method. To add one, subclass with `kind`, `model` and `opt_state`, and add it to CHOICES.

    `frozen_a` is how A is drawn if it is not trained, or "none" (see `low_rank.wrap`).
    """

    frozen_a: ClassVar[str] = "none"

    def start(self, model: Any) -> Any:
        """Called at the start of the low-rank phase: the wrapped model, changed in place or not."""
        return model

    @property
    def trains_a(self) -> bool:
        """Whether A is trained, as B always is."""
        return self.frozen_a == "none"

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
        from relora_jax.core.low_rank import merge_and_reinit

        return merge_and_reinit(model, key=key)

    def opt_state(self, opt_state: Any, *, key: Any) -> Any:
        """See `reset.reset`."""
        from relora_jax.core.reset import reset

        return reset(opt_state, key)


class OneSided(MergeAndReinit):
    """Draws A from N(0, 1/r) and never trains it: gradients and moments exist for B alone."""

    kind: ClassVar[str] = "one_sided"
    frozen_a: ClassVar[str] = "normal"


class OneSidedOrthonormal(OneSided):
    """Draws A with orthogonal columns, and never trains it."""

    kind: ClassVar[str] = "one_sided_orthonormal"
    frozen_a: ClassVar[str] = "orthonormal"


class MergeAndReinitLate(MergeAndReinit):
    """Starts with A = 0 and B = 0, so that neither has a gradient before the first restart."""

    kind: ClassVar[str] = "merge_and_reinit_late"

    def start(self, model: Any) -> Any:
        """Sets A to 0."""
        from relora_jax.core.low_rank import low_rank_layers

        for _, dense in low_rank_layers(model):
            dense.lora_a[...] *= 0
        return model


_METHODS = (MergeAndReinit, OneSided, OneSidedOrthonormal, MergeAndReinitLate)
CHOICES: dict[str, type[Restart]] = {choice.kind: choice for choice in _METHODS}


def parse(text: object) -> Restart:
    """The method that `text` names. ValueError, listing the valid ones, otherwise."""
    return grammar.parse(text, CHOICES, name="restart")
