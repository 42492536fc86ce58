"""What is known about a target before it is used with trees."""

from speclm.verify.backend import Backend
from speclm.verify.self_check import SelfCheck, check_trees

__all__ = ["Backend", "SelfCheck", "check_trees"]
