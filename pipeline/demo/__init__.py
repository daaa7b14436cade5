"""A pool and evaluation sets drawn by code."""
