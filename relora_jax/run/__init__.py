"""A run's directory: opening it, its rows and where they go, signals."""
