import pytest

from speclm.data.repairs import repair
from speclm.data.schemas import RowError

ROLES = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}


def conversation(letters):
    """Return turns by the first letters of their roles; a capital is an empty turn."""
    return [
        {"role": ROLES[letter.lower()], "content": letter if letter.islower() else " "}
        for letter in letters
    ]


KEPT = [
    ("ua", "ua", []),
    ("suaua", "suaua", []),
    ("ssua", "ssua", []),
    ("uattaua", "uattaua", []),
    ("uaTa", "uaTa", []),
    ("Sua", "ua", ["empty_system"]),
    ("aua", "ua", ["leading_turns"]),
    ("satua", "sua", ["leading_turns"]),
    ("uau", "ua", ["unanswered_end"]),
    ("uat", "ua", ["unanswered_end"]),
    ("uaa", "ua", ["cut_role_order"]),
    ("uauuaua", "ua", ["cut_role_order"]),
    ("uatua", "ua", ["cut_role_order"]),
    ("uasua", "ua", ["cut_role_order"]),
    ("uauA", "ua", ["cut_empty_turn"]),
    ("aSuaUa", "ua", ["leading_turns", "empty_system", "cut_empty_turn"]),
]
REFUSED = [
    ("", "no_answer"),
    ("su", "no_answer"),
    ("sa", "no_answer"),
    ("uua", "role_order"),
    ("uta", "role_order"),
    ("uA", "empty_turn"),
    ("Ua", "empty_turn"),
]


def test_what_is_kept_is_a_conversation_that_ends_with_an_answer():
    for letters, kept, reasons in KEPT:
        assert repair(conversation(letters)) == (conversation(kept), reasons)


def test_conversations_without_an_answer_to_a_question_are_refused():
    for letters, reason in REFUSED:
        with pytest.raises(RowError, match=r"the roles are .*expected an answer") as raised:
            repair(conversation(letters))
        assert raised.value.reason == reason


def test_a_turn_that_calls_a_tool_needs_no_text():
    call = {"role": "assistant", "content": None, "tool_calls": [{}]}
    turns = [{"role": "user", "content": "q"}, call]
    assert repair(turns) == (turns, [])
