"""Medusa's rule, by hand."""

import math

import jaxtyping
import pytest
import torch
from transformers.generation import TemperatureLogitsWarper

from speclm.acceptance import TypicalRule, Verified
from speclm.errors import OptionError
from speclm.sampling import TokenChooser
from speclm.tree import chain, from_parents

CPU = torch.device("cpu")
SURE = [0.97, 0.01, 0.01, 0.01]
SPREAD = [0.4, 0.3, 0.2, 0.1]


def accept(tokens, distributions, topology, *, rule=None, warpers=()):
    tokens = torch.tensor(tokens)
    return (rule or TypicalRule()).accept(
        Verified(
            draft_tokens=tokens,
            topology=topology,
            logits=torch.tensor(distributions).log(),
            chooser=TokenChooser(list(warpers), is_greedy=False),
            is_live=[True] * len(tokens),
        )
    )


def test_a_token_is_likely_above_the_threshold_that_the_entropy_sets():
    entropy = -sum(p * math.log(p) for p in SPREAD)
    threshold = 0.3 * math.exp(-entropy)
    assert threshold < 0.09 < 0.1
    for token, distribution in ((3, SPREAD), (2, SPREAD)):
        assert accept([[0, token]], [[distribution, SURE]], chain(1)).emitted == [[token, 0]]
    assert accept([[0, 1]], [[SURE, SURE]], chain(1)).emitted == [[0]]
    strict = TypicalRule(epsilon=1.0, delta=0.12 / math.exp(-entropy))
    assert accept([[0, 3]], [[SPREAD, SURE]], chain(1), rule=strict).emitted == [[0]]
    assert accept([[0, 2]], [[SPREAD, SURE]], chain(1), rule=strict).emitted == [[2, 0]]


def test_the_longest_path_wins_and_of_equal_ones_the_most_probable():
    topology = from_parents([[0, 0, 0, 2]], device=CPU)
    deeper = accept([[0, 0, 2, 1]], [[SPREAD] * 4], topology)
    assert deeper.paths == [[0, 2, 3]]
    assert deeper.emitted == [[2, 1, 0]]
    topology = from_parents([[0, 0, 0, 1, 2]], device=CPU)
    # 0.2 * 0.4 stands against 0.3 * 0.2: the later node has the less likely parent
    equal = accept([[0, 2, 1, 0, 2]], [[SPREAD] * 5], topology)
    assert equal.emitted == [[2, 0, 0]]


def test_nothing_below_an_unlikely_node_is_kept():
    accepted = accept([[0, 1, 0]], [[SURE] * 3], chain(2))
    assert accepted.paths == [[0]]


def test_temperature_counts():
    cold = [TemperatureLogitsWarper(0.2)]
    assert accept([[0, 3]], [[SPREAD, SURE]], chain(1)).emitted == [[3, 0]]
    assert accept([[0, 3]], [[SPREAD, SURE]], chain(1), warpers=cold).emitted == [[0]]


def test_padding_is_never_accepted_though_its_token_is_likely():
    topology = from_parents([[0], [0, 0, 1]], device=CPU)
    accepted = accept([[3, 0, 0], [3, 0, 0]], [[SURE] * 3] * 2, topology)
    assert accepted.paths == [[0], [0, 1, 2]]
    assert accepted.emitted == [[0], [0, 0, 0]]


def test_nan_is_reported_where_the_path_ends():
    nan = [math.nan] * 4
    assert accept([[0, 0]], [[nan, SURE]], chain(1)).emitted == [[-1]]
    assert accept([[0, 0]], [[SURE, nan]], chain(1)).emitted == [[0, -1]]


@pytest.mark.parametrize("options", [{"epsilon": 1.5}, {"delta": -1.0}, {"epsilon": math.nan}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(OptionError, match=r"expected 0\.0 to"):
        TypicalRule(**options)


@pytest.mark.parametrize("name", ["epsilon", "delta"])
@pytest.mark.parametrize("wrong", ["a", None, [1], True])
def test_options_of_the_wrong_type_are_named(name, wrong, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as users run it
    with pytest.raises(OptionError, match=f"{name} is .*, a {type(wrong).__name__}, expected a"):
        TypicalRule(**{name: wrong})
