"""Code that the trainers of all methods share. Not imported by ``import speclm``."""
