"""Answers requests over HTTP, takes events, and changes models while it does."""
