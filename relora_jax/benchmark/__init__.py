"""How fast a run's programs are, beside each other and beside PyTorch, and how fast its rows are read."""
