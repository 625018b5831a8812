"""Losses, optimizer, stages and the pure training step; no files, no state."""
