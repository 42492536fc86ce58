"""What is known about a target before it is used with trees."""

from speclm.verify.backend import Backend
from speclm.verify.self_check import check_model
from speclm.verify.trees import check_trees
from speclm.verify.verdict import SelfCheck
from speclm.verify.watch import Watch, first_in_training, may_draw

__all__ = [
    "Backend",
    "SelfCheck",
    "Watch",
    "check_model",
    "check_trees",
    "first_in_training",
    "may_draw",
]
