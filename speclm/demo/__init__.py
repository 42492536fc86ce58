"""Bundled models and prompts that show real speculation without a download."""

from speclm.demo._assets import assets
from speclm.demo.prompts import load_prompts

__all__ = ["assets", "load_prompts"]
