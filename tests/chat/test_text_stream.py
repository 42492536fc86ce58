import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from speclm.chat import Piece, RoundStreamer, TextDecoder
from speclm.config import MAX_DEPTH
from speclm.demo.bundle import assets
from speclm.errors import OptionError
from tests.byte_tokenizer import END, byte_tokenizer

BYTES = byte_tokenizer()


def encode(text):
    return BYTES(text, add_special_tokens=False)["input_ids"]


def stream(tokens, **settings):
    pieces = []
    streamer = RoundStreamer(BYTES, pieces.append, **settings)
    streamer.put(torch.tensor([[5, 6, 7]]))  # the prompt
    for token in tokens:
        streamer.put(torch.tensor([token]))
    return streamer, pieces


@given(st.text(st.characters(exclude_characters="\ufffd", exclude_categories=["Cs"])))
def test_pieces_of_single_bytes_join_to_the_text_and_hold_whole_characters(text):
    decoder = TextDecoder(BYTES)
    pieces = [decoder.push(token) for token in encode(text)]
    assert "".join(pieces) == text
    assert all("\ufffd" not in piece for piece in pieces)


@given(st.text(max_size=8))
def test_pieces_of_the_bundled_tokenizer_join_to_what_it_decodes(text):
    tokenizer = bundled_tokenizer()
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    decoder = TextDecoder(tokenizer)
    streamed = "".join(map(decoder.push, tokens))
    # A text that ends with the sign for broken characters cannot be told from a broken one.
    assert streamed == tokenizer.decode(tokens, skip_special_tokens=True).rstrip("\ufffd")


def bundled_tokenizer():
    if not hasattr(bundled_tokenizer, "loaded"):
        bundled_tokenizer.loaded = AutoTokenizer.from_pretrained(assets()["base"])
    return bundled_tokenizer.loaded


def test_a_character_comes_with_its_last_byte():
    decoder = TextDecoder(BYTES)
    assert [decoder.push(token) for token in encode("你🙂")] == ["", "", "你", "", "", "", "🙂"]


def test_half_a_character_at_the_end_is_never_shown():
    _, pieces = stream(encode("ab好")[:-1])
    assert "".join(piece.text for piece in pieces) == "ab"


def test_broken_bytes_in_the_middle_are_shown_once_the_text_goes_on():
    decoder = TextDecoder(BYTES)
    tokens = [*encode("好")[:2], *encode("a")]
    assert [decoder.push(token) for token in tokens] == ["", "", "\ufffda"]


def test_special_and_skipped_tokens_have_no_text():
    streamer, pieces = stream([END, *encode("a"), *encode("b")], skipped=frozenset(encode("b")))
    streamer.end()
    assert pieces == [Piece("a", is_drafted=False)]


def test_rounds_mark_the_tokens_that_were_drafted():
    pieces = []
    streamer = RoundStreamer(BYTES, pieces.append, marks_drafted=lambda: True)
    streamer.put(torch.tensor([[5]]))
    for text, accepted_length in (("abc", 2), ("d", 0), ("好", 2)):
        for token in encode(text):
            streamer.put(torch.tensor([token]))
        streamer.on_round(accepted_length)
    streamer.end()
    assert [(piece.text, piece.origin, piece.round, piece.depth) for piece in pieces] == [
        ("a", "drafted", 1, 1),
        ("b", "drafted", 1, 2),
        ("c", "bonus", 1, 0),
        ("d", "bonus", 2, 0),
        ("好", "bonus", 3, 0),  # completed by the target's own token
    ]
    assert streamer.num_rounds == 3


def test_a_round_is_held_back_until_it_is_reported():
    streamer, pieces = stream(encode("abc"), marks_drafted=lambda: True)
    assert pieces == []
    streamer.on_round(1)
    assert [piece.is_drafted for piece in pieces] == [True, False, False]


def test_text_is_not_held_back_when_nobody_asks_for_marks():
    streamer, pieces = stream(encode("abc"))
    assert [piece.text for piece in pieces] == ["a", "b", "c"]
    streamer.on_round(2)
    assert {piece.origin for piece in pieces} == {"regular"}


def test_text_goes_on_unmarked_when_rounds_are_never_reported():
    text = "x" * (MAX_DEPTH + 10)
    streamer, pieces = stream(encode(text), marks_drafted=lambda: True)
    assert len(pieces) == len(text)
    assert not any(piece.is_drafted for piece in pieces)
    assert streamer.num_rounds == 0


def test_what_is_held_at_the_end_is_shown():
    streamer, pieces = stream(encode("abc"), marks_drafted=lambda: True)
    streamer.end()
    assert "".join(piece.text for piece in pieces) == "abc"


def test_several_rows_are_refused():
    streamer = RoundStreamer(BYTES, print)
    with pytest.raises(OptionError, match="shows one row, found a prompt of 2"):
        streamer.put(torch.zeros(2, 3, dtype=torch.long))
