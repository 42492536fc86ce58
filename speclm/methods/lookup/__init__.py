"""Drafts without training, from the text so far and what the target thought likely before."""
