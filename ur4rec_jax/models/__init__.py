"""Flax Linen modules: pure functions from parameters and arrays to arrays."""
