"""How tokens are chosen: processors, the noise of each position, and draws of other kinds."""

from speclm.sampling.chooser import TokenChooser, first_text_dependent
from speclm.sampling.drafts import DraftSampler, DraftSampling
from speclm.sampling.draws import Draws, GeneratorDraws, seeded_draws
from speclm.sampling.generators import generator_obstacle
from speclm.sampling.noise import PositionNoise

__all__ = [
    "DraftSampler",
    "DraftSampling",
    "Draws",
    "GeneratorDraws",
    "PositionNoise",
    "TokenChooser",
    "first_text_dependent",
    "generator_obstacle",
    "seeded_draws",
]
