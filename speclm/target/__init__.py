"""The target: the only package that knows how a Hugging Face model is called."""

from speclm.target.chain_session import ChainReader, ChainSession, prompt_inputs
from speclm.target.claims import NestedError, exclusive
from speclm.target.features import TargetFeatures, is_tap
from speclm.target.images import images_obstacle, position_shift
from speclm.target.logits import (
    embedding_map,
    logits_map,
    output_matrix,
    product_weight,
    replaced_forward,
    stored_matrices,
)
from speclm.target.session import Session, TreeSession
from speclm.target.static_forward import StaticForward
from speclm.target.view import TargetView

__all__ = [
    "ChainReader",
    "ChainSession",
    "NestedError",
    "Session",
    "StaticForward",
    "TargetFeatures",
    "TargetView",
    "TreeSession",
    "embedding_map",
    "exclusive",
    "images_obstacle",
    "is_tap",
    "logits_map",
    "output_matrix",
    "position_shift",
    "product_weight",
    "prompt_inputs",
    "replaced_forward",
    "stored_matrices",
]
