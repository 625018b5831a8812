"""Frozen encoders: texts, pictures and imports -> files of token embeddings."""
