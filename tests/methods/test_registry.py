from speclm.drafting.registry import register_proposer, registered_proposers
from speclm.methods.ngram.proposer import NgramProposer


def test_registered_class_is_found_and_returned_unchanged(monkeypatch):
    monkeypatch.setattr("speclm.drafting.registry._PROPOSERS", {})
    register = register_proposer("mine")
    assert register(NgramProposer) is NgramProposer
    assert registered_proposers() == {"mine": NgramProposer}


def test_registering_a_name_again_replaces_the_class(monkeypatch):
    class Other(NgramProposer):
        pass

    monkeypatch.setattr("speclm.drafting.registry._PROPOSERS", {})
    register_proposer("mine")(NgramProposer)
    register_proposer("mine")(Other)
    assert registered_proposers() == {"mine": Other}


def test_returned_dictionary_is_a_copy():
    registered_proposers().clear()
    assert "ngram" in registered_proposers()
