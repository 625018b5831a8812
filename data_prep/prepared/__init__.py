"""Columns of raw data -> the files of a prepared folder."""
