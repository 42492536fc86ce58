"""Turns, counters and errors as HTML; every text that comes from outside is escaped."""

from collections.abc import Iterable, Sequence
from html import escape

from speclm.chat import Answer, Piece
from speclm.webui.turns import Comparison, Progress, Turn

_MAX_BARS = 12
_FINISHES = {
    "length": "ended at the bound of tokens, or at the model's last position",
    "stopped": "stopped",
}
_STATES = {
    "waiting": "waiting for another conversation's answer",
    "answering": "answering",
    "comparing": "regular generation answers",
}

HINT = '<p class="hint">Ask something, or choose an example.</p>'
"""What is shown before the first question."""

LEGEND = (
    '<p class="legend"><span class="drafted">drafted and accepted</span> '
    '<span class="bonus">bonus token of the model itself</span> '
    "<span>regular: no colour</span> Point at a token for its round and depth.</p>"
)
"""What the colours of tokens mean."""


def render_turns(turns: Iterable[Turn]) -> str:
    """Return questions with their answers."""
    return "".join(map(render_turn, turns))


def render_turn(turn: Turn) -> str:
    """Return a question with its answers so far, next to each other if they are compared."""
    name = escape(turn.settings.method)
    answers = [_answer(f"speculative, {name}", turn.pieces, turn.progress, turn.answer)]
    if turn.settings.compares:
        regular = turn.regular_pieces, turn.regular_progress, turn.regular
        answers.append(_answer("regular generation", *regular))
    verdict = ""
    if turn.comparison is not None and turn.answer is not None:
        verdict = _verdict(turn.comparison, num_tokens=len(turn.answer.tokens))
    state = _STATES.get(turn.state)
    note = "" if state is None else f'<p class="state" role="status">{state} …</p>'
    return (
        f'<article><p class="question">{escape(turn.question)}</p>'
        f'<div class="answers">{"".join(answers)}</div>{verdict}{note}</article>'
    )


def render_figures(progress: Progress) -> str:
    """Return counters, and the acceptance by position as a chart."""
    figures = {
        "tokens/s": f"{progress.tokens_per_second:.0f}" if progress.num_tokens else "-",
        "tau": f"{progress.tau:.2f}" if progress.num_rounds else "-",
        "tokens": str(progress.num_tokens),
        "rounds": str(progress.num_rounds),
    }
    cells = "".join(
        f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in figures.items()
    )
    return f'<dl class="figures">{cells}</dl>{_chart(progress.acceptance_by_depth)}'


def render_error(message: str) -> str:
    """Return an error, which assistive software reads out."""
    return f'<p class="error" role="alert">{escape(message)}</p>'


def _answer(name: str, pieces: Sequence[Piece], progress: Progress, answer: Answer | None) -> str:
    notes = []
    if progress.num_tokens:
        notes.append(f"{_tokens(progress.num_tokens)}, {progress.tokens_per_second:.0f} tokens/s")
    if progress.num_rounds:
        notes.append(f"tau {progress.tau:.2f}")
    if answer is not None:
        if answer.num_reused_tokens:
            notes.append(f"{answer.num_reused_tokens} prompt tokens from the cache")
        notes += [_FINISHES[answer.finish]] if answer.finish in _FINISHES else []
        notes += [escape(f"regular generation: {why}") for why in answer.speculation.fallbacks]
    return (
        f'<section><h3>{name}</h3><p class="text">{"".join(map(_token, pieces))}</p>'
        f'<p class="note">{"; ".join(notes)}</p></section>'
    )


def _tokens(number: int) -> str:
    return f"{number} token{'' if number == 1 else 's'}"


def _token(piece: Piece) -> str:
    label = "regular generation"
    if piece.origin == "drafted":
        label = f"drafted: depth {piece.depth}, round {piece.round}"
    elif piece.origin == "bonus":
        label = f"bonus: round {piece.round}"
    return f'<span class="{piece.origin}" data-label="{label}">{escape(piece.text)}</span>'


def _verdict(found: Comparison, *, num_tokens: int) -> str:
    speed = "speed-up not known: regular generation had to read more of the conversation"
    if found.speed_up is not None:
        speed = f"{found.speed_up:.2f}x as fast as regular generation"
    if found.is_identical:
        return f'<p class="verdict same">✓ identical: {_tokens(num_tokens)}; {speed}</p>'
    return (
        f'<p class="verdict other">✗ the first {found.num_equal} of {num_tokens} tokens are equal; '
        f"{speed}</p>"
    )


def _chart(shares: Sequence[float]) -> str:
    """Return bars of the share of drafts whose token at depth 1, 2, ... was kept."""
    bars = "".join(
        f'<div class="bar" data-label="depth {depth}: {share:.0%}">'
        f'<i style="height:{100 * share:.0f}%"></i><b>{depth}</b></div>'
        for depth, share in enumerate(shares[:_MAX_BARS], 1)
    )
    listed = ", ".join(f"{share:.0%}" for share in shares[:_MAX_BARS]) or "nothing drafted yet"
    return (
        f'<figure role="img" aria-label="Accepted, by depth: {listed}"><div class="bars">{bars}'
        "</div><figcaption>accepted, by depth in the draft</figcaption></figure>"
    )
