"""The target: the only package that knows how a Hugging Face model is called."""

from speclm.target.claims import exclusive
from speclm.target.features import TargetFeatures
from speclm.target.view import TargetView

__all__ = ["TargetFeatures", "TargetView", "exclusive"]
