import pytest

from speclm.drafting.sources import CandidateSource


def test_a_source_has_to_do_all_that_a_tree_asks_for():
    class Silent(CandidateSource):
        start_rates = (0.5,)

    with pytest.raises(TypeError, match=r"advance.*begin.*candidates.*commit.*root"):
        Silent()
