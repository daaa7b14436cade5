"""Generative objectives."""
