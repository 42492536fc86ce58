from speclm.chat import Piece
from speclm.webui import Comparison, Progress, Session, Turn
from speclm.webui.rendering import render_error, render_figures, render_turn, render_turns
from tests.webui.models import settings, tiny_methods

HOSTILE = "<script>alert(1)</script>&\"'"


def test_no_text_from_outside_becomes_markup():
    pieces = [Piece(HOSTILE, is_drafted=True, round=1, depth=1)]
    turn = Turn(HOSTILE, settings(method=HOSTILE), 0, pieces=pieces)
    for html in (render_turn(turn), render_error(HOSTILE)):
        assert "<script" not in html
        assert "&lt;script&gt;alert(1)&lt;/script&gt;&amp;&quot;&#x27;" in html


def test_tokens_are_coloured_by_origin_and_labelled_with_round_and_depth():
    pieces = [
        Piece("a", is_drafted=True, round=3, depth=2),
        Piece("b", is_drafted=False, round=3),
        Piece("c", is_drafted=False),
    ]
    html = render_turn(Turn("q", settings(), 0, pieces=pieces))
    assert '<span class="drafted" data-label="drafted: depth 2, round 3">a</span>' in html
    assert '<span class="bonus" data-label="bonus: round 3">b</span>' in html
    assert '<span class="regular" data-label="regular generation">c</span>' in html


def test_a_turn_shows_both_answers_how_they_ended_and_whether_they_are_equal():
    session = Session(tiny_methods())
    for question in ("abcabc", "b"):
        *_, turn = session.ask(question, settings(compares=True))
    html = render_turn(turn)
    assert "24 tokens" in html
    assert "ended at the bound of tokens" in html
    assert "prompt tokens from the cache" in html
    assert html.count("<section>") == 2
    assert "✓ identical: 24 tokens" in html
    turn.comparison = Comparison(num_equal=3, is_identical=False, speed_up=None)
    assert "✗ the first 3 of 24 tokens are equal; speed-up not known" in render_turn(turn)
    turn.answer.speculation.fallbacks.append("because <b>")
    assert "regular generation: because &lt;b&gt;" in render_turn(turn)
    assert render_turns(session.turns).count("<article>") == 2


def test_an_answer_that_waits_says_so():
    assert "waiting for another conversation" in render_turn(Turn("q", settings(), 0))


def test_figures_are_numbers_and_a_chart_that_can_be_read_out():
    progress = Progress(12, 2.0, num_rounds=4, tau=3.0, acceptance_by_depth=(0.75, 0.5))
    html = render_figures(progress)
    assert "<dt>tokens/s</dt><dd>6</dd>" in html
    assert "<dt>tau</dt><dd>3.00</dd>" in html
    assert 'aria-label="Accepted, by depth: 75%, 50%"' in html
    assert html.count('class="bar"') == 2
    assert "nothing drafted yet" in render_figures(Progress())
