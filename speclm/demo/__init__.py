"""Bundled models and prompts that show real speculation without a download."""

from speclm.demo.bundle import assets, load_prompts, load_questions

__all__ = ["assets", "load_prompts", "load_questions"]
