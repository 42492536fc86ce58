"""What block heads are trained on: against loops and hand-computed cases."""

import math
from dataclasses import replace

import pytest
import torch

from speclm import SpecModel
from speclm.errors import OptionError
from speclm.methods.block import objective as objective_module
from speclm.methods.block.blocks import count_blocks, find_blocks
from speclm.methods.block.objective import BlockObjective, BlockTrainingModel
from speclm.methods.block.proposer import BlockProposer
from speclm.methods.block.training import new_block_heads
from speclm.training import training_model
from speclm.training.dataset import collate_examples
from tests.methods.block.loss_reference import reference
from tests.models import build_model, prompts
from tests.training.runs import require_sum_of_parts

CLOSE = 1e-5  # losses of float32 logits, on float64 weights
VOCAB = 24
ROWS = [
    ([3, 9, 4, 20, 7, 7, 2], [0, 0, 1, 1, 1, 1, 1]),
    ([5, 1, 8, 23, 0, 6, 6, 14, 2, 11], [0, 0, 1, 1, 0, 0, 1, 1, 1, 1]),
]
ALL = {"token_weight": 0.2, "distribution_weight": 0.3, "distance_weight": 0.5}


def tiny_base():
    return build_model("llama", num_hidden_layers=4, vocab_size=VOCAB, hidden_size=16)


def build(kind="dspark", *, columns=None, objective=None, base=None, **changes):
    base = base or tiny_base()
    changes = {"feature_layers": (1, 3), **changes}
    heads = new_block_heads(base, kind=kind, block_size=3, columns=columns, **changes)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():  # fresh heads draft much the same at every position
        for parameter in heads.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            inputs = parameter.shape[-1]
            parameter.copy_(noise * inputs**-0.5 if parameter.ndim > 1 else 1 + 0.2 * noise)
    usual = BlockObjective.usual(kind, num_drafts=heads.config.num_drafts)
    return BlockTrainingModel(base, heads, objective=replace(usual, **(objective or {})))


def batch_of(rows=ROWS):
    return collate_examples([{"input_ids": tokens, "loss_mask": mask} for tokens, mask in rows])


CASES = [
    pytest.param("dspark", {}, {}, marks=pytest.mark.slow),
    ("dspark", ALL, {"markov": "gated", "windows": (None, 2), "has_attention_bias": True}),
    ("dspark", ALL, {"markov": "rnn", "num_layers": 1, "has_confidence": False}),
    ("dflash", {"temperature": 2.0, "distribution_weight": 0.4}, {"feature_layers": (0, 4)}),
    pytest.param("jetspec", {}, {"num_layers": 1}, marks=pytest.mark.slow),
    ("dspark", ALL, {"columns": torch.arange(0, VOCAB, 2)}),
]


@pytest.mark.parametrize(("kind", "objective", "changes"), CASES)
def test_loss_and_gradients_are_those_of_loops(kind, objective, changes):
    if kind == "dspark" and "num_layers" not in changes:
        changes = {"markov_rank": 5, **changes}
    model = build(kind, objective=objective, **changes)
    model.view.model.double()
    model.heads.double()
    output = model(**batch_of())
    output["loss"].backward()
    trained = {name: p for name, p in model.heads.named_parameters() if p.requires_grad}
    found = {name: parameter.grad.clone() for name, parameter in trained.items()}
    model.zero_grad()
    loss, sums, counts, ranks = reference(model.heads, model.view.model, ROWS, model.objective)
    loss.backward()
    assert output["loss"].item() == pytest.approx(loss.item(), abs=CLOSE)
    assert output["loss_sums"].tolist() == pytest.approx(sums, abs=10 * CLOSE)
    assert output["counts"].tolist() == counts
    for name, parameter in trained.items():
        assert parameter.grad.abs().max() > 10 * CLOSE, name  # or else nothing is compared
        torch.testing.assert_close(found[name], parameter.grad, atol=CLOSE, rtol=0, msg=name)
    measured = {
        (row, position + 1): [rank for rank in drafted if rank >= 0]
        for row, texts in enumerate(output["ranks"].tolist())
        for position, drafted in enumerate(texts)
        if drafted[0] >= 0
    }
    assert measured == ranks


def test_hand_computed_loss_of_one_token():
    model = build("dflash", objective={"distance_weight": 0.5, "distribution_weight": 2.0})
    rows = [([1, 2, 3], [0, 1, 1])]  # one anchor, one target
    output = model(**batch_of(rows))
    model.heads.requires_grad_(requires_grad=False)
    features, last = model.read_base(torch.tensor([[1, 2, 3]]), torch.ones(1, 3).long(), (1, 3))
    blocks = find_blocks(
        torch.tensor([[1, 2, 3]]),
        torch.tensor([[False, True, True]]),
        num_drafts=2,
        max_anchors=None,
    )
    logits = model.lm_head(model.draft(features, torch.tensor([[1, 2, 3]]), blocks))[0, 0, 0]
    drafted, wanted = logits.softmax(0), model.view.head_logits(last)[0, 1].softmax(0)
    expected = -math.log(drafted[3])
    expected += 0.5 * (drafted - wanted).abs().sum().item()
    expected -= 2.0 * (wanted * drafted.log()).sum().item()
    assert output["loss"].item() == pytest.approx(expected, abs=CLOSE)
    assert output["counts"].tolist() == [1, 0]


def test_rounds_are_replayed_over_whole_texts_only():
    model = build(objective={"max_anchors": 2})
    rows = [([3, 9, 4, 20], [0, 1, 1, 1]), ([5, 1, 8, 23, 0, 6], [0, 1, 1, 1, 1, 1])]
    model.train()
    assert model(**batch_of(rows))["loss_mask"].any(1).tolist() == [True, False]
    model.eval()
    assert model(**batch_of(rows))["loss_mask"].any(1).tolist() == [True, True]


@pytest.mark.parametrize("kind", ["dspark", "dflash"])
def test_padding_and_other_rows_change_nothing(kind):
    model = build(kind)
    alone = [model(**batch_of([row])) for row in ROWS]
    together = model(**batch_of())
    sums = alone[0]["loss_sums"] + alone[1]["loss_sums"]
    torch.testing.assert_close(together["loss_sums"], sums, atol=CLOSE * 100, rtol=CLOSE)
    assert torch.equal(together["ranks"][0, :7], alone[0]["ranks"][0])


def test_text_without_a_block_adds_nothing():
    model = build()
    output = model(**batch_of([([1, 2, 3], [0, 0, 1])]))
    assert output["counts"].tolist() == [0, 0, 0]
    assert output["loss"].item() == 0.0
    output["loss"].backward()
    assert not model.heads.fc.weight.grad.any()


def test_chunks_change_neither_loss_nor_gradient(monkeypatch):
    model = build(markov="rnn", markov_rank=4)
    whole = model(**batch_of())
    whole["loss"].backward()
    gradient = model.heads.fc.weight.grad.clone()
    model.zero_grad()
    monkeypatch.setattr(training_model, "MAX_LOGITS", 4 * VOCAB * 2)  # two rows at a time
    monkeypatch.setattr(objective_module, "MAX_LOGITS", 1000)  # two blocks at a time
    chunked = model(**batch_of())
    chunked["loss"].backward()
    torch.testing.assert_close(chunked["loss"], whole["loss"], atol=CLOSE, rtol=0)
    torch.testing.assert_close(model.heads.fc.weight.grad, gradient, atol=CLOSE, rtol=0)
    assert torch.equal(chunked["ranks"], whole["ranks"])


def test_base_and_shared_matrices_are_not_trained():
    base = tiny_base()
    model = build(base=base, columns=torch.arange(12), has_own_embeddings=True)
    model.train()
    assert not model.view.model.training
    model(**batch_of())["loss"].backward()
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {"heads.embed_tokens.weight", "heads.lm_head.weight"}
    assert all(p.grad is None for p in base.parameters())
    assert set(model.state_dict()) == {f"heads.{name}" for name in model.heads.state_dict()}


def test_heads_in_float32_train_on_a_narrower_base():
    model = build()
    model.view.model.to(torch.bfloat16)
    output = model(**batch_of())
    assert output["loss"].dtype == torch.float32
    output["loss"].backward()
    assert model.heads.fc.weight.grad.dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"token_weight": -1.0}, r"token_weight is -1.0, expected 0.0 to"),
        ({"temperature": 0.0}, r"temperature is 0.0, expected a finite number above 0"),
        ({"decay_length": 0.0}, r"decay_length is 0.0, expected a finite number above 0"),
        ({"max_anchors": 0}, r"max_anchors is 0, expected 1 to"),
        ({"token_weight": 0.0, "distance_weight": 0.0}, r"are all 0, expected one above 0"),
    ],
)
def test_objectives_out_of_range_are_refused(options, words):
    with pytest.raises(OptionError, match=words):
        BlockObjective(**options)


def test_usual_objectives_are_those_of_the_kinds():
    assert BlockObjective.usual("dspark", num_drafts=8) == BlockObjective()
    assert BlockObjective.usual("dflash", num_drafts=7).decay_length == 4.0
    assert BlockObjective.usual("dflash", num_drafts=15).decay_length == 7.0
    assert BlockObjective.usual("jetspec", num_drafts=15).decay_length is None
    with pytest.raises(OptionError, match=r"kind is 'eagle', expected one of \('dspark'"):
        BlockObjective.usual("eagle", num_drafts=7)


@pytest.mark.parametrize("kind", ["dspark", "dflash"])
def test_training_reads_and_computes_what_decoding_does(kind):
    base = tiny_base().double()
    inputs = prompts(5, vocab_size=VOCAB)
    settings = {"max_new_tokens": 22, "do_sample": False}
    said = base.generate(**inputs, **settings)
    model = build(kind, base=base)
    heads = model.heads.double().eval()
    drafted, read, context = {}, [], heads.context

    def watch_context(features, rotation):
        read.append(features[0])
        return context(features, rotation)

    def watch_draft(heads, arguments, hidden):
        drafted[sum(map(len, read))] = hidden[0]  # the anchor follows what was read

    heads.context = watch_context
    handle = heads.register_forward_hook(watch_draft)
    spec = SpecModel(base, BlockProposer(heads, target=base), adaptive=False)
    assert torch.equal(spec.generate(**inputs, **settings), said)
    handle.remove()
    del heads.context

    features, _ = model.read_base(said, torch.ones_like(said), (1, 3))
    found = torch.cat(read)  # of the prompt and of each round's tokens
    torch.testing.assert_close(found, features[0, : len(found)], atol=CLOSE, rtol=0)
    blocks = find_blocks(
        said, torch.arange(27)[None] >= 5, num_drafts=heads.config.num_drafts, max_anchors=None
    )
    hidden = model.draft(features, said, blocks)[0]
    assert set(drafted) <= {*blocks.anchors[0].tolist(), 26}
    assert len(drafted) > 8
    for block, anchor in enumerate(blocks.anchors[0].tolist()):
        if anchor in drafted:
            seen = drafted[anchor]  # the last ones may be shorter
            torch.testing.assert_close(seen, hidden[block, : len(seen)], atol=CLOSE, rtol=0)


def test_losses_of_accumulated_batches_add_up():
    model = build("dspark", objective=ALL, markov_rank=5)
    require_sum_of_parts(model, [{"input_ids": row, "loss_mask": mask} for row, mask in ROWS])


def test_texts_with_too_many_blocks_count_as_often_as_blocks_are_drawn():
    mask = torch.tensor([[0, 1, 1, 1, 1, 1]]).bool()  # four anchors: 3, 2, 2 and 1 targets
    weights = torch.tensor([1.0, 0.5, 0.25])
    total = 4 * 1.0 + 3 * 0.5 + 2 * 0.25
    assert count_blocks(mask, weights, max_anchors=4).tolist() == [total]
    assert count_blocks(mask, weights, max_anchors=1).tolist() == [total / 4]
