"""How tokens are chosen: processors and the noise of each position."""

from speclm.sampling.chooser import TokenChooser, first_context_dependent
from speclm.sampling.noise import PositionNoise

__all__ = ["PositionNoise", "TokenChooser", "first_context_dependent"]
