"""Ids of a text: SentencePiece models, tokenizer.json."""
