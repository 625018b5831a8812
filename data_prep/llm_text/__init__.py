"""Texts that an LLM writes about items and users: prompts, asking, storing, writing."""
