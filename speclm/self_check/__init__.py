"""The self-check of a model at load time, which decides how its drafts are verified."""
