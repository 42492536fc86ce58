"""Model cards of what can be trained and published."""

from speclm.cards._parts import GENERATED_MARK
from speclm.cards.eagle import EagleCard
from speclm.cards.medusa import MedusaCard

__all__ = ["GENERATED_MARK", "EagleCard", "MedusaCard"]
