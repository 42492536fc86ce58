"""Model cards of what can be trained and published."""

from speclm.cards.medusa import GENERATED_MARK, MedusaCard

__all__ = ["GENERATED_MARK", "MedusaCard"]
