"""Checkpoints: to resume from, and to load."""
