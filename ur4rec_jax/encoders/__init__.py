"""Frozen text encoders, shared by data preparation and recommending."""
