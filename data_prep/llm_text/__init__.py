"""Generates texts about items and users with an LLM: prompts, requests, storage, output."""
