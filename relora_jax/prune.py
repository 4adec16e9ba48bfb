"""For config files that an earlier `import_hf` wrote: they import `magnitude` from here."""

from relora_jax.core.prune import magnitude as magnitude
