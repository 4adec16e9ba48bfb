"""Where config files that older imports wrote take their prune choice from; `relora_jax` has it."""

from relora_jax.core.prune import magnitude as magnitude
