"""Ranking of held-out items under a named protocol, and the metrics."""
