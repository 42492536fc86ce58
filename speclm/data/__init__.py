"""Training data for heads: convert what others publish. Not imported by ``import speclm``."""

from speclm.data.conversion import convert
from speclm.data.report import ConversionReport, Outcome

__all__ = ["ConversionReport", "Outcome", "convert"]
