"""The check of a model when it is loaded: how its drafts are verified."""
