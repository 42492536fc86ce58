"""Drafts the tokens that followed the same tokens before."""
