"""Drafts what the target thought likely after the same tokens before."""
