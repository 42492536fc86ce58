"""Choice of tokens: logits processors, the noise of each position, and other draws."""

from speclm.sampling.chooser import TokenChooser, first_text_dependent
from speclm.sampling.draws import DraftSampler, DraftSampling, Draws, GeneratorDraws, seeded_draws
from speclm.sampling.noise import PositionNoise, generator_obstacle

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
