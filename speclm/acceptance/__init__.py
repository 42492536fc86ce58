"""Accept rules: pure functions on tensors."""

from speclm.acceptance.accepted import Accepted
from speclm.acceptance.exact import accept_exact

__all__ = ["Accepted", "accept_exact"]
