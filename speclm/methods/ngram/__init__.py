"""Drafts what followed the same tokens before."""
