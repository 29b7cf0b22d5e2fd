"""Crafted models in vLLM."""
