"""Assistants of Gemma 4, which read the keys and values of their target."""
