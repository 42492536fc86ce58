"""Proposers: what guesses how the target will continue."""

from speclm.config import ProposerConfig
from speclm.proposers.draft_model import DraftModelConfig, DraftModelProposer
from speclm.proposers.interface import Draft, Prefill, Proposer, TargetFeatures
from speclm.proposers.ngram import NgramConfig, NgramProposer
from speclm.proposers.registry import register_proposer, registered_proposers

__all__ = [
    "Draft",
    "DraftModelConfig",
    "DraftModelProposer",
    "NgramConfig",
    "NgramProposer",
    "Prefill",
    "Proposer",
    "ProposerConfig",
    "TargetFeatures",
    "register_proposer",
    "registered_proposers",
]
