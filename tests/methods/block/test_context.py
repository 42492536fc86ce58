"""Keys and values of committed tokens: chunks, ragged rows, growth, and what blocks see."""

import pytest
import torch

from speclm.devices import upload
from speclm.methods.block import context
from speclm.methods.block.context import BlockContext
from speclm.methods.block.network import block_masks
from tests.methods.block.block_heads import make_heads

WIDTH = 16
CLOSE = {"rtol": 0, "atol": 1e-12}  # float64


def features_of(batch: int, seq: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, seq, WIDTH, generator=generator, dtype=torch.float64)


def test_chunks_and_single_tokens_leave_what_one_pass_leaves(monkeypatch):
    heads, features = make_heads(), features_of(1, 23)
    keys, values = heads.context(features, heads.rotation(torch.arange(23)[None]))
    monkeypatch.setattr(context, "CHUNK", 5)
    monkeypatch.setattr(context, "_LEAST_CAPACITY", 4)
    found = BlockContext(heads, first_positions=[0])
    found.append(features[:, :13], [13])
    found.append(features[:, 13:14], [1])
    found.append(features[:, 14:], [9])
    assert found.lengths == [23]
    torch.testing.assert_close(found.keys, keys, **CLOSE)
    torch.testing.assert_close(found.values, values, **CLOSE)


def test_rows_keep_their_own_lengths_and_positions(monkeypatch):
    monkeypatch.setattr(context, "_LEAST_CAPACITY", 4)
    heads, padding = make_heads(), [0, 3, 1]
    found = BlockContext(heads, first_positions=[-number for number in padding])
    prompt = features_of(3, 6)
    found.append(prompt, [6] * 3)
    texts = [prompt[row, number:] for row, number in enumerate(padding)]
    for seed, counts in enumerate([[2, 0, 3], [0, 4, 1], [3, 1, 0]], start=1):
        new = features_of(3, max(counts), seed)
        found.append(new, counts)
        texts = [
            torch.cat([text, new[row, :count]])
            for row, (text, count) in enumerate(zip(texts, counts, strict=True))
        ]
        for row, text in enumerate(texts):
            keys, values = heads.context(text[None], heads.rotation(torch.arange(len(text))[None]))
            past = found.lengths[row]
            torch.testing.assert_close(
                found.keys[:, row, :, padding[row] : past], keys[:, 0], **CLOSE
            )
            torch.testing.assert_close(
                found.values[:, row, :, padding[row] : past], values[:, 0], **CLOSE
            )
            following = heads.rotation(torch.arange(len(text), len(text) + 2)[None])
            for part, wanted in zip(found.rotation(2), following, strict=True):
                assert torch.equal(part.expand(3, -1, -1, -1)[row], wanted[0])
    assert found.keys.isfinite().all()


@pytest.mark.parametrize(
    ("first", "counts"), [([0], [9]), ([0], [0]), ([-2, 0], [9, 9]), ([0, 0], [9, 4]), ([4], [9])]
)
@pytest.mark.parametrize("windows", [(None, None), (5, 12)])
@pytest.mark.parametrize("is_causal", [(True, True), (False, True)])
def test_blocks_see_the_text_before_them(first, counts, windows, is_causal):
    heads = make_heads(windows=windows, is_causal=is_causal)
    found = BlockContext(heads, first_positions=first)
    found.append(features_of(len(first), max(counts)), counts)
    entries = torch.arange(max(counts))
    context_positions = entries + torch.tensor(first)[:, None]
    seen = (context_positions >= 0) & (entries < torch.tensor(counts)[:, None])
    anchors = torch.tensor(first) + torch.tensor(counts)
    for size in (2, 4):
        expected = block_masks(
            heads.config,
            seen[:, None],
            context_positions=context_positions,
            anchors=anchors[:, None],
            num_positions=size,
        )
        for mask, exact in zip(found.masks(size), expected, strict=True):
            sees = mask if mask is None or mask.dtype == torch.bool else mask == 0
            assert exact.all() if sees is None else torch.equal(sees.expand_as(exact), exact)
        following = heads.rotation(anchors[:, None] + torch.arange(size))
        for part, wanted in zip(found.rotation(size), following, strict=True):
            assert torch.equal(part.expand_as(wanted), wanted)


def test_ragged_rows_copy_their_lengths_once_a_round(monkeypatch):
    found = BlockContext(make_heads(windows=(5, 12)), first_positions=[-2, 0])
    found.append(features_of(2, 9), [9, 7])
    found.masks(4)
    copied = []
    monkeypatch.setattr(
        "speclm.methods.block.context.upload",
        lambda values, device: copied.append(values) or upload(values, device),
    )
    for counts in ([2, 1], [1, 3]):
        found.append(features_of(2, max(counts)), counts)
        found.rotation(4)
        found.masks(4)
    assert copied == [[11, 8], [12, 11]]
