"""Block drafters: DFlash, DSpark and JetSpec heads, which draft a whole block in one pass."""
