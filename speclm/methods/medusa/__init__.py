"""Medusa: heads that each draft one of the next tokens from one hidden state."""
