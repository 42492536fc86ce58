"""The public surface: `SpecModel` and `patch`."""

from speclm.model.call import SpeculativeOutput
from speclm.model.spec_model import SpecModel, patch

__all__ = ["SpecModel", "SpeculativeOutput", "patch"]
