"""Measuring: held-out loss, and comparisons that say how sure they are."""
