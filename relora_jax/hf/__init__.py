"""transformers' formats, both ways."""
