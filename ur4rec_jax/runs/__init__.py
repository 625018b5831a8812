"""Training runs: everything that has state, files and a folder."""
