"""What is known about a target before it is used with trees."""

from speclm.verify.backend import Backend
from speclm.verify.self_check import check_model
from speclm.verify.trees import check_trees
from speclm.verify.verdict import SelfCheck

__all__ = ["Backend", "SelfCheck", "check_model", "check_trees"]
