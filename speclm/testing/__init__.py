"""Checks and stand-ins for those who write a proposer."""

from speclm.testing.contract import check_proposer
from speclm.testing.scripted import ScriptedProposer

__all__ = ["ScriptedProposer", "check_proposer"]
