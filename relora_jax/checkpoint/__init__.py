"""A run's checkpoints: saving a state, restoring a state, reading single variables."""
