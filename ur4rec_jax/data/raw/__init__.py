"""Reads the tables that people bring, of any format, into checked columns and items."""
