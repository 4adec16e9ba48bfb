"""A run: its directory, opening and restoring it, metrics and sinks, signals."""
