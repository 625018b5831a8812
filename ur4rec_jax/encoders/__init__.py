"""Frozen encoders of texts, pictures and sounds, shared by data preparation and recommending."""
