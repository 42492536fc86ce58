import json
from itertools import islice

import pytest
import torch

from speclm.chat import Chat, RoundStreamer
from speclm.errors import BusyError, OptionError, PromptError, UnknownNameError
from speclm.webui import Methods, Session
from tests.byte_tokenizer import byte_tokenizer
from tests.webui.models import settings, tiny_methods

QUESTION = "abcabcabcabc"


@pytest.fixture
def session():
    return Session(tiny_methods())


def last(turns):
    """Return the last of the turns that a question yields."""
    *_, turn = turns
    return turn


def test_an_answer_is_that_of_a_chat_and_its_pieces_name_where_they_come_from(session):
    turn = last(session.ask(QUESTION, settings()))
    chat = Chat(tiny_methods().load("ngram"), byte_tokenizer())
    answer = chat.ask(QUESTION, options={"max_new_tokens": 24, "do_sample": False})
    assert turn.answer.tokens == answer.tokens
    assert "".join(piece.text for piece in turn.pieces) == answer.text == turn.answer.text
    assert {piece.origin for piece in turn.pieces} == {"drafted", "bonus"}
    rounds = [piece.round for piece in turn.pieces]
    assert rounds == sorted(rounds)
    assert rounds[-1] == turn.progress.num_rounds + 1  # the prompt's own forward is the first
    assert (turn.state, turn.regular, turn.comparison) == ("done", None, None)


def test_counters_are_those_of_the_call(session):
    turn = last(session.ask(QUESTION, settings()))
    stats = turn.answer.speculation
    assert turn.progress.num_tokens == len(turn.answer.tokens) == 24
    assert (turn.progress.tau, turn.progress.num_rounds) == (stats.tau, stats.rounds)
    assert turn.progress.acceptance_by_depth == tuple(stats.acceptance_by_depth)
    assert turn.progress.tokens_per_second == 24 / turn.answer.seconds


def test_an_answer_is_yielded_while_it_grows(session, monkeypatch):
    monkeypatch.setattr("speclm.webui.session.UPDATE_SECONDS", 0.002)
    lengths, counted = set(), set()
    for turn in session.ask(QUESTION, settings(max_new_tokens=120)):
        lengths.add(len(turn.pieces))
        counted.add(turn.progress.num_tokens)
    assert len(lengths) > 3
    assert len(counted) > 3
    assert max(lengths) == max(counted) == 120


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_regular_generation_with_the_same_seed_gives_the_same_tokens_in_every_turn(
    session, temperature
):
    for question, method in ((QUESTION, "ngram"), ("bca", "recycling"), ("a", "none")):
        options = settings(method=method, temperature=temperature, compares=True, seed=3)
        turn = last(session.ask(question, options))
        assert turn.comparison.is_identical
        assert turn.comparison.num_equal == 24
        assert turn.comparison.speed_up > 0
        assert turn.regular.text == turn.answer.text
        assert {piece.origin for piece in turn.regular_pieces} == {"regular"}
    assert [turn.seed for turn in session.turns] == [3, 4, 5]
    assert session.turns[1].answer.num_reused_tokens > 0  # of another method's turn


@pytest.mark.parametrize("tree", ["auto", 3, 64])
def test_trees_of_the_users_size_give_the_same_tokens(session, tree):
    assert last(session.ask(QUESTION, settings(tree=tree, compares=True))).comparison.is_identical


def test_a_stopped_answer_keeps_its_text_and_is_not_compared(session):
    turns = session.ask(QUESTION, settings(max_new_tokens=380, compares=True))
    for turn in turns:
        if turn.pieces:
            session.stop()
    assert turn.answer.finish == "stopped"
    assert 0 < len(turn.answer.tokens) < 380
    assert (turn.regular, turn.comparison) == (None, None)
    assert session.export()["messages"][-1]["content"] == turn.answer.text


def test_an_answer_that_nobody_watches_on_is_stopped(session):
    turns = session.ask(QUESTION, settings(max_new_tokens=380))
    next(turns)
    turns.close()
    session._thread.join()
    assert session.turns[0].answer.finish == "stopped"
    assert last(session.ask("a", settings())).answer.finish == "length"


def test_conversations_wait_for_each_other_and_may_give_up():
    methods = tiny_methods()
    first, second = Session(methods), Session(methods)
    with methods.lock:
        turns = first.ask(QUESTION, settings())
        assert [turn.state for turn in islice(turns, 3)] == ["waiting"] * 3
        with pytest.raises(BusyError, match="answer is being generated; stop it first"):
            first.reset()
        with pytest.raises(BusyError, match="answer is being generated; stop it, or wait"):
            next(first.ask("a", settings()))
        given_up = second.ask("b", settings())
        next(given_up)
        second.stop()
        with pytest.raises(BusyError, match="stopped before the model was free; ask again"):
            last(given_up)
    assert last(turns).state == "done"
    assert second.turns == []


@pytest.mark.parametrize(
    ("question", "options", "error", "words"),
    [
        (" \n", {}, PromptError, "question is empty.*write one"),
        ("\ud800", {}, OptionError, "question is no Unicode text"),
        ("a", {"method": "medsua"}, UnknownNameError, "method is 'medsua'.*'ngram'.*choose"),
        ("a" * 500, {}, PromptError, "has 5.. tokens, and the model has 400 positions"),
        ("a", {"system": "\ud800"}, OptionError, "message of the system is no Unicode text"),
    ],
)
def test_an_error_leaves_the_conversation_as_it_was(session, question, options, error, words):
    last(session.ask("a", settings()))
    before = session.export()
    with pytest.raises(error, match=words):
        last(session.ask(question, settings(**{"system": "unused", **options})))
    assert session.export() == before
    assert last(session.ask("b", settings(system="be brief"))).state == "done"
    messages = session.export()["messages"]
    assert [message["role"] for message in messages] == ["system", *["user", "assistant"] * 2]


@pytest.mark.parametrize("failing", ["ask", "answer_regularly"])
def test_an_error_of_the_model_is_raised_and_leaves_the_conversation_as_it_was(
    session, monkeypatch, failing
):
    def fail(*_, **__):
        raise torch.OutOfMemoryError("1 GiB")

    last(session.ask("a", settings()))
    before = session.export()
    monkeypatch.setattr(Chat, failing, fail)
    with pytest.raises(torch.OutOfMemoryError):
        last(session.ask("b", settings(compares=True, system="unused")))
    assert session.export() == before
    monkeypatch.undo()
    assert last(session.ask("b", settings(compares=True))).comparison.is_identical


def test_an_error_in_the_middle_of_an_answer_leaves_nothing_in_the_cache(session, monkeypatch):
    last(session.ask(QUESTION, settings()))
    streamed = RoundStreamer.on_round

    def fail(streamer, accepted_length):
        streamed(streamer, accepted_length)
        if streamer.num_rounds == 3:
            raise torch.OutOfMemoryError("1 GiB")

    monkeypatch.setattr(RoundStreamer, "on_round", fail)
    with pytest.raises(torch.OutOfMemoryError):
        last(session.ask("bca", settings()))
    monkeypatch.undo()
    turn = last(session.ask("bca", settings(compares=True)))
    assert turn.answer.num_reused_tokens == 0
    fresh = Session(tiny_methods())
    for question in (QUESTION, "bca"):
        expected = last(fresh.ask(question, settings()))
    assert turn.answer.tokens == expected.answer.tokens == turn.regular.tokens


def test_an_export_holds_messages_settings_pieces_and_counters(session):
    with pytest.raises(OptionError, match="no answer to export yet"):
        session.export()
    turn = last(session.ask(QUESTION, settings(compares=True, tree=4, seed=7)))
    last(session.ask("b", settings(seed=7)))
    found = json.loads(json.dumps(session.export()))
    first, second = found["turns"]
    assert found["messages"][1] == {"role": "assistant", "content": turn.answer.text}
    assert first["answer"] == "".join(piece["text"] for piece in first["pieces"])
    assert first["statistics"]["mean_acceptance_length"] == turn.progress.tau
    assert (first["settings"]["tree"], first["settings"]["seed"]) == (4, 7)
    assert first["regular"]["token_ids"] == first["token_ids"] == turn.answer.tokens
    assert first["regular"]["comparison"]["is_identical"] is True
    assert (second["settings"]["seed"], second["regular"]) == (8, None)
    drafted = [piece for piece in first["pieces"] if piece["origin"] == "drafted"]
    assert all(piece["depth"] >= 1 and piece["round"] >= 1 for piece in drafted)
    session.reset()
    assert session.turns == []


def test_methods_are_loaded_when_first_used_and_warmed_on_request():
    methods = tiny_methods()
    assert methods.names == ["ngram", "recycling", "none"]
    methods.warm_up("recycling")
    assert methods.load("recycling").last_speculation is not None
    assert methods.load("recycling") is methods.load("recycling")
    with pytest.raises(OptionError, match="found no method"):
        Methods({}, byte_tokenizer())
    with pytest.raises(OptionError, match="no chat template"):
        Methods({"ngram": lambda: methods.load("ngram")}, byte_tokenizer(None))
