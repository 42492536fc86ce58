"""The order of turns that training and chat templates need, and what is cut to get it."""

from collections.abc import Sequence

from speclm.data.schemas import Message, RowError

_NEXT = {
    "system": {"system", "user"},
    "user": {"assistant"},
    "assistant": {"user", "tool"},
    "tool": {"tool", "assistant"},
}
"""Roles that may follow a role; a conversation begins as after a system turn."""


def repair(messages: Sequence[Message]) -> tuple[list[Message], list[str]]:
    """Return the turns to train on, and the reasons why others are left out.

    Turns of the assistant before the first question are left out, and so are empty system turns.
    The conversation ends before the first turn that is empty or that cannot follow the one before
    it, and after the last answer that is left.

    Args:
        messages: Turns as `speclm.data.schemas` returns them.

    Raises:
        RowError: If no answer to a user turn is left.
    """
    kept: list[Message] = []
    reasons: list[str] = []
    cut = ""
    before = "system"
    for message in messages:
        role = message["role"]
        if before == "system" and role in ("assistant", "tool"):
            reasons.append("leading_turns")
        elif role == before == "system" and _is_empty(message):
            reasons.append("empty_system")
        elif _is_empty(message) or role not in _NEXT[before]:
            cut = "empty_turn" if _is_empty(message) else "role_order"
            break
        else:
            kept.append(message)
            before = role
    end = max((at for at, each in enumerate(kept, 1) if each["role"] == "assistant"), default=0)
    if not end:
        roles = ", ".join(message["role"] for message in messages[:6])
        raise RowError(cut or "no_answer", f"the roles are {roles or 'none'}, expected an answer")
    if cut:
        reasons.append(f"cut_{cut}")
    elif end < len(kept):
        reasons.append("unanswered_end")
    return kept[:end], list(dict.fromkeys(reasons))


def _is_empty(message: Message) -> bool:
    if message["role"] == "tool" or message.get("tool_calls"):
        return False  # what a tool returns may be empty
    content = message["content"]
    return not content or content.isspace()
