"""Devices and processes, and which device holds which item embeddings."""
