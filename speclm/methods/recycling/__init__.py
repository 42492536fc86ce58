"""Drafts what the target itself thought likely after the same tokens."""
