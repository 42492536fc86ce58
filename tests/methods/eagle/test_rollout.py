"""What a position sees at each step, found by changing one input at a time."""

from dataclasses import replace

import pytest
import torch

from speclm.methods.eagle.config import EagleConfig
from speclm.methods.eagle.network import EagleHeads
from speclm.methods.eagle.rollout import roll_out

LENGTH, STEPS, VOCAB = 7, 3, 11


def heads_of(kind, **numbers):
    config = EagleConfig(
        kind=kind,
        hidden_size=8,
        intermediate_size=8,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
        vocab_size=VOCAB,
        draft_vocab_size=VOCAB,
        target_hidden_size=8,
        num_features=3 if kind == "eagle3" else 1,
    )
    heads = EagleHeads(replace(config, **numbers), dtype=torch.float64)
    heads.init_weights_(generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for parameter in heads.parameters():
            if parameter.ndim > 1:
                parameter.mul_(20)
    return heads


@torch.no_grad()
def outputs(heads, features, tokens, sources=None):
    table = torch.randn(VOCAB, 8, generator=torch.Generator().manual_seed(1)).double()
    positions = torch.arange(LENGTH - 1)[None] if sources is None else sources
    found = roll_out(
        heads, features, tokens, positions, num_steps=STEPS, embedding=lambda ids: table[ids]
    )
    return torch.stack(list(found))[:, 0]  # [steps, positions, hidden]


def inputs_of(heads):
    generator = torch.Generator().manual_seed(2)
    width = 8 * heads.config.num_features
    features = torch.randn(1, LENGTH, width, generator=generator).double()
    return features, torch.randint(0, VOCAB, (1, LENGTH), generator=generator)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize(("kind", "num_layers"), [("eagle", 1), ("eagle3", 1), ("eagle3", 2)])
def test_positions_read_the_features_up_to_their_own_and_the_tokens_that_were_drafted(
    kind, num_layers, window
):
    heads = heads_of(kind, num_layers=num_layers, sliding_window=window)
    features, tokens = inputs_of(heads)
    before = outputs(heads, features, tokens)
    for changed in range(LENGTH):
        other = features.clone()
        other[0, changed] += 1
        differs = (outputs(heads, other, tokens) != before).any(-1)
        for step in range(STEPS):
            for position in range(LENGTH - 1 - step):
                distance = position - changed
                # Its own features come through the step before, whatever the window.
                expected = distance == 0 or (
                    distance > 0 and (window is None or distance < window + (num_layers - 1) * 2)
                )
                assert bool(differs[step, position]) == expected, (changed, step, position)


def test_later_tokens_are_not_seen():
    heads = heads_of("eagle3")
    features, tokens = inputs_of(heads)
    before = outputs(heads, features, tokens)
    for changed in range(LENGTH):
        other = tokens.clone()
        other[0, changed] = (other[0, changed] + 1) % VOCAB
        differs = (outputs(heads, features, other) != before).any(-1)
        for step in range(STEPS):
            for position in range(LENGTH - 1 - step):
                expected = 1 <= changed <= position + 1 + step
                assert bool(differs[step, position]) == expected, (changed, step, position)


def test_some_sources_get_what_all_positions_would():
    heads = heads_of("eagle3")
    features, tokens = inputs_of(heads)
    whole = outputs(heads, features, tokens)
    some = outputs(heads, features, tokens, torch.tensor([[1, 3]]))
    for step in range(STEPS):
        torch.testing.assert_close(some[step], whole[step][[1, 3]])
