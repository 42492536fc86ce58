"""Medusa: heads that each draft one later token from one hidden state."""
