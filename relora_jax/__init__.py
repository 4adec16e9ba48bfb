"""ReLoRA pretraining (arXiv 2307.05695) in JAX and Flax."""
