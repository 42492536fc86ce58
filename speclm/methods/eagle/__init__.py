"""EAGLE-1, EAGLE-2 and EAGLE-3: a small decoder over the hidden states of the target."""
