"""From documents to rows to batches."""
