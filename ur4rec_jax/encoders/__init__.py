"""Frozen text encoders, which both data preparation and recommending need."""
