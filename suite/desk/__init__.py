"""The embedded default: how the small desk models, their tokenizer and their problems are made."""
