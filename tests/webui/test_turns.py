import re
from dataclasses import replace

import pytest

from speclm.chat import Answer
from speclm.errors import OptionError
from speclm.stats import SpeculationStats
from speclm.webui import Comparison, Progress, Settings

ANSWER = Answer("abc", [1, 2, 3], 5, 0, "end", 0.5, SpeculationStats(), 0)


def test_answers_are_compared_token_by_token_and_by_their_speed():
    slow = replace(ANSWER, seconds=1.0)
    assert Comparison.of(ANSWER, slow) == Comparison(3, is_identical=True, speed_up=2.0)
    other = replace(ANSWER, tokens=[1, 5, 3])
    assert Comparison.of(ANSWER, other) == Comparison(1, is_identical=False, speed_up=1.0)
    more = replace(ANSWER, num_reused_tokens=4)  # it had less to read
    assert Comparison.of(ANSWER, more).speed_up is None


def test_speed_counts_all_tokens_over_all_time():
    assert Progress.of_answer(ANSWER).tokens_per_second == 6.0
    assert Progress().tokens_per_second == 0.0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": None}, "temperature is None.*expected a number"),
        ({"top_p": 2.0}, "top_p is 2.0"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"seed": 1.5}, "seed is 1.5"),
        ({"tree": 0}, "tree is 0"),
        ({"tree": "automatic"}, "tree is 'automatic'"),
    ],
)
def test_settings_out_of_range_are_refused(options, words):
    with pytest.raises(OptionError, match=re.escape(words.split(".*")[0])):
        Settings("ngram", **options)


def test_sampling_is_what_generate_takes():
    greedy = Settings("ngram", max_new_tokens=3).arguments()
    assert greedy == {"max_new_tokens": 3, "do_sample": False}
    sampled = Settings("ngram", temperature=0.5, top_p=0.9, tree="auto").arguments()
    assert (sampled["do_sample"], sampled["top_p"], sampled["tree"]) == (True, 0.9, "auto")
