"""Fetching pictures: an HTTP client for servers that cannot be trusted, and TMDB's posters."""
