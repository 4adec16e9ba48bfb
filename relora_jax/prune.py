"""For config files that an earlier `import_hf` wrote, or that were copied from earlier ones: `core.prune`."""

from relora_jax.core.prune import Prune, magnitude, none, parse, random, zero

__all__ = ["Prune", "magnitude", "none", "parse", "random", "zero"]
