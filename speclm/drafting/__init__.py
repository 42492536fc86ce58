"""What a drafting method implements, and what methods share."""
