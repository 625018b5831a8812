"""Recommends items with a trained or exported model, from Python and over HTTP."""
