"""A verdict says whether drafts are verified at all."""

import math

import pytest

from speclm.self_check.verdict import Backend, SelfCheck


@pytest.mark.parametrize("backend", Backend)
def test_all_but_plain_decoding_pass(backend):
    check = SelfCheck(backend, "because")
    assert check.passes is (backend is not Backend.PLAIN)
    assert check.error == math.inf
    assert not check.is_cached
