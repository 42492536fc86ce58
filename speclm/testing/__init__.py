"""Tools for tests of a proposer: a check of its contract, and a scripted one."""

from speclm.testing.contract import check_proposer
from speclm.testing.scripted import ScriptedProposer

__all__ = ["ScriptedProposer", "check_proposer"]
