"""Turns columns of raw data into the files of a prepared folder."""
