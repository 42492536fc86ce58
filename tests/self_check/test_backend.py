"""The ways to verify drafts have names that reports use."""

from speclm.self_check.verdict import Backend


def test_values_are_words_for_reports():
    assert [backend.value for backend in Backend] == [
        "tree attention",
        "chains",
        "regular generation",
    ]
