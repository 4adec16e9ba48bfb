"""What of a run lies on disk: one writer, two readers (a whole state, single variables)."""
