"""Flax networks. They know `core` and nothing else of ours."""
