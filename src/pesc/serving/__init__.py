"""Crafted models behind other people's servers."""
