import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from speclm.data.ids import Content, HashSet, Namer, given_id

BATCHES = st.lists(st.lists(st.integers(0, 40), max_size=12), max_size=12)


@given(BATCHES)
def test_the_set_says_which_hashes_are_new_as_a_set_does(batches):
    found, seen = HashSet(), set()
    for batch in batches:
        expected = []
        for value in batch:
            expected.append(value not in seen)
            seen.add(value)
        assert found.add(np.array(batch, dtype=np.uint64)) == expected


def test_the_set_takes_eight_bytes_for_each_hash():
    found = HashSet()
    for start in range(0, 100_000, 500):
        found.add(np.arange(start, start + 500, dtype=np.uint64))
    assert sum(run.nbytes for run in found._runs) == 800_000
    assert len(found._runs) < 12


def test_ids_are_strings_or_whole_numbers_of_a_known_column():
    assert [given_id(row) for row in ({"id": "a"}, {"id": 0}, {"conversation_id": "b"})] == [
        *("a", "0", "b")
    ]
    rows = [{}, {"id": ""}, {"id": None}, {"id": True}, {"id": ["a"]}, {"id": 1.5}]
    assert [given_id(row) for row in rows] == [None] * 6


def name(*rows, deduplicate=False):
    """Return the names of (given id, text), a row a batch."""
    namer = Namer(deduplicate=deduplicate)
    contents = [Content(text, given, at) for at, (given, text) in enumerate(rows, 1)]
    return [found for content in contents for found in namer.name([content])]


def test_an_id_is_the_given_one_if_it_is_new_or_a_hash():
    rows = [("a", b"1"), ("a", b"2"), (None, b"3"), (None, b"3"), (None, b"3"), ("b", b"3")]
    names = name(*rows)
    assert (names[0], names[5]) == ("a", "b")
    assert len(set(names)) == 6
    assert names[1:3] == [name((None, text))[0] for text in (b"2", b"3")]
    assert names[2] == "c3585b60b755fb13e6e65a16d20f1230"  # on every machine
    namer = Namer(deduplicate=False)
    assert namer.name([Content(t, g, at) for at, (g, t) in enumerate(rows, 1)]) == names


def test_repeated_conversations_get_no_name_where_they_are_dropped():
    rows = [("a", b"1"), ("b", b"1"), ("b", b"2"), (None, b"2")]
    assert name(*rows, deduplicate=True) == ["a", None, "b", None]
