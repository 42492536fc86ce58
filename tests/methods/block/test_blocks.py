from itertools import product

import pytest
import torch

from speclm.methods.block import blocks as blocks_module
from speclm.methods.block.blocks import accepted_lengths, find_blocks
from speclm.methods.block.tree import BlockProposerConfig
from tests.methods.block.block_heads import MARKOV, make_heads
from tests.methods.block.loss_reference import markov_terms


def test_blocks_begin_where_the_assistant_wrote_two_tokens_and_end_with_its_turn():
    tokens = torch.tensor([[1, 2, 3, 4, 5, 6, 7], [8, 9, 10, 11, 0, 0, 0]])
    mask = torch.tensor([[0, 1, 1, 1, 0, 1, 1], [1, 1, 1, 0, 0, 0, 0]]).bool()
    blocks = find_blocks(tokens, mask, num_drafts=2, max_anchors=None)
    assert blocks.anchors.tolist() == [[1, 2, 5], [1, 0, 0]]  # nothing is known before position 0
    none = -100
    assert blocks.targets.tolist() == [
        [[3, 4], [4, none], [7, none]],
        [[10, none], [none, none], [none, none]],
    ]
    assert blocks.previous[0].tolist() == [[2, 3], [3, 4], [6, 7]]
    assert blocks.is_complete.tolist() == [True, True]


def test_more_blocks_than_the_maximum_are_drawn_at_random():
    tokens = torch.arange(40).view(2, 20)
    mask = torch.ones(2, 20).bool()
    mask[1, 4:] = False
    torch.manual_seed(0)
    drawn = [find_blocks(tokens, mask, num_drafts=2, max_anchors=3) for _ in range(60)]
    assert {int(anchor) for blocks in drawn for anchor in blocks.anchors[0]} == set(range(1, 19))
    assert all(len(set(blocks.anchors[0].tolist())) == 3 for blocks in drawn)
    assert {tuple(sorted(blocks.anchors[1].tolist())) for blocks in drawn} == {(0, 1, 2)}
    assert drawn[0].is_complete.tolist() == [False, True]


def best_paths(heads, hidden, root, table, *, num_nodes, ends):
    """Return the likeliest paths, found by scoring all of them."""
    depth, vocab = len(hidden), heads.config.vocab_size
    scores = {}
    for path in product(range(vocab), repeat=depth):
        terms = [0.0] * depth
        if heads.markov_head is not None:
            terms = markov_terms(heads, [root, *path[:-1]], hidden)
        total = 0.0
        for k, token in enumerate(path):
            total += (table @ hidden[k] + terms[k]).log_softmax(0)[token].item()
            scores[path[: k + 1]] = total
            if token in ends:
                break
    return set(sorted(scores, key=scores.get, reverse=True)[:num_nodes])


@pytest.mark.parametrize("markov", [{**MARKOV, "markov": "vanilla"}, {**MARKOV, "markov": "rnn"}])
@pytest.mark.parametrize("chunk", [10**6, 1])
def test_accepted_lengths_are_those_of_the_likeliest_of_all_paths(monkeypatch, markov, chunk):
    heads = make_heads(**{**markov, "vocab_size": 4, "draft_vocab_size": 4, "block_size": 3})
    generator = torch.Generator().manual_seed(5)
    table = torch.randn(4, 8, generator=generator, dtype=torch.float64)
    hidden = torch.randn(6, 3, 8, generator=generator, dtype=torch.float64)
    roots = torch.tensor([0, 1, 2, 3, 0, 1])
    monkeypatch.setattr(blocks_module, "MAX_LOGITS", chunk)
    config = BlockProposerConfig(
        depth=3, num_draft_tokens=7, width=16, branches=4, min_probability=0.0
    )
    paths = [
        best_paths(heads, states, root, table, num_nodes=7, ends=(2,))
        for states, root in zip(hidden, roots.tolist(), strict=True)
    ]
    for targets in product(range(4), repeat=3):
        wanted = torch.tensor([targets] * 6)
        if targets[0] == 1:
            wanted[:, 2] = -100  # the text ends
        found = accepted_lengths(
            heads,
            hidden,
            roots,
            wanted,
            config=config,
            lm_head=lambda states: states @ table.T,
            end_ids=(2,),
        )
        for length, drafted, text in zip(found.tolist(), paths, wanted.tolist(), strict=True):
            expected = 0
            while expected < 3 and tuple(text[: expected + 1]) in drafted:
                expected += 1
            assert length == expected


def test_no_blocks_have_no_lengths():
    found = accepted_lengths(
        make_heads(),
        torch.zeros(0, 4, 8, dtype=torch.float64),
        torch.zeros(0, dtype=torch.long),
        torch.zeros(0, 4, dtype=torch.long),
        config=BlockProposerConfig(),
        lm_head=lambda states: states,
        end_ids=(),
    )
    assert found.tolist() == []
