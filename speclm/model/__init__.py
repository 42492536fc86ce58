"""The public surface: `SpecModel` and `patch`."""

from speclm.model.call import SpeculativeOutput
from speclm.model.patching import patch
from speclm.model.spec_model import SpecModel

__all__ = ["SpecModel", "SpeculativeOutput", "patch"]
