"""The interface of a drafting method, and what methods share."""
