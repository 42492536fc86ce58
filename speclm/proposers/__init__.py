"""Proposers: what guesses how the target will continue."""

from speclm.config import ProposerConfig
from speclm.proposers._levels import GrownTreeConfig
from speclm.proposers.chain_draft import ChainDraftConfig, ChainDraftProposer
from speclm.proposers.combined import CombinedConfig, CombinedProposer
from speclm.proposers.draft_model import DraftModelConfig, DraftModelProposer
from speclm.proposers.eagle import EagleProposer, EagleProposerConfig
from speclm.proposers.interface import Draft, Prefill, Proposer, TargetNeeds
from speclm.proposers.medusa import MedusaConfig, MedusaProposer
from speclm.proposers.mixture import Mixture
from speclm.proposers.ngram import NgramConfig, NgramProposer
from speclm.proposers.registry import register_proposer, registered_proposers
from speclm.target import TargetFeatures

__all__ = [
    "ChainDraftConfig",
    "ChainDraftProposer",
    "CombinedConfig",
    "CombinedProposer",
    "Draft",
    "DraftModelConfig",
    "DraftModelProposer",
    "EagleProposer",
    "EagleProposerConfig",
    "GrownTreeConfig",
    "MedusaConfig",
    "MedusaProposer",
    "Mixture",
    "NgramConfig",
    "NgramProposer",
    "Prefill",
    "Proposer",
    "ProposerConfig",
    "TargetFeatures",
    "TargetNeeds",
    "register_proposer",
    "registered_proposers",
]
