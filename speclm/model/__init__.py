"""The public surface: `SpecModel`."""

from speclm.model.spec_model import SpecModel, SpeculativeOutput

__all__ = ["SpecModel", "SpeculativeOutput"]
