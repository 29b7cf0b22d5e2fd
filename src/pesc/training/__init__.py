"""Tuning: recipe, data, trainer, progress."""
