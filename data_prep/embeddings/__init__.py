"""Encodes texts, pictures, table columns and imported features into files of token embeddings."""
