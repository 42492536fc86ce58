"""What EAGLE heads are trained on: against loops, and against what decoding computes."""

from dataclasses import replace

import pytest
import torch

from speclm import SpecModel
from speclm.errors import OptionError
from speclm.methods.eagle.config import EagleConfig
from speclm.methods.eagle.network import EagleHeads
from speclm.methods.eagle.objective import (
    EagleObjective,
    EagleTrainingModel,
    feature_loss,
)
from speclm.methods.eagle.proposer import EagleProposer
from speclm.methods.eagle.rollout import roll_out
from speclm.methods.eagle.training import new_eagle_heads
from speclm.training import training_model
from speclm.training.dataset import collate_examples
from tests.methods.eagle.loss_reference import reference
from tests.models import build_model, prompts
from tests.training.runs import require_sum_of_parts

CLOSE = 1e-5  # losses of float32 logits, on float64 weights
KINDS = ("eagle", "eagle3")
VOCAB = 24
LAYERS = (1, 2, 3)
ROWS = [
    ([3, 9, 4, 20, 7, 7, 2], [0, 0, 1, 1, 1, 1, 1]),
    ([5, 1, 8, 23, 0, 6, 6, 14, 2, 11], [0, 0, 1, 1, 0, 0, 1, 1, 1, 1]),
]


def tiny_base(**settings):
    return build_model("llama", num_hidden_layers=4, vocab_size=VOCAB, hidden_size=16, **settings)


def heads_of(base, kind, *, draft_vocab_size=None):
    """Return heads whose drafts differ from slot to slot, which fresh ones' hardly do."""
    columns = None
    if draft_vocab_size is not None:
        columns = torch.arange(0, VOCAB, VOCAB // draft_vocab_size)
    heads = new_eagle_heads(
        base, kind=kind, columns=columns, feature_layers=LAYERS if kind == "eagle3" else None
    )
    with torch.no_grad():
        generator = torch.Generator().manual_seed(2)
        for parameter in heads.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            inputs = parameter.shape[-1]
            parameter.copy_(noise * inputs**-0.5 if parameter.ndim > 1 else 1 + 0.2 * noise)
    return heads


def build(kind, *, draft_vocab_size=None, **objective):
    base = tiny_base()
    heads = heads_of(base, kind, draft_vocab_size=draft_vocab_size)
    wanted = replace(EagleObjective.usual(kind), noise=0.0, **objective)
    return EagleTrainingModel(base, heads, objective=wanted)


def batch_of(rows=ROWS):
    return collate_examples([{"input_ids": tokens, "loss_mask": mask} for tokens, mask in rows])


CASES = [
    ("eagle3", {"draft_vocab_size": 12, "num_steps": 3, "num_measured": 3}),
    ("eagle3", {"num_steps": 2, "num_measured": 2, "decay": 0.5}),
    pytest.param("eagle", {"num_steps": 1, "num_measured": 1}, marks=pytest.mark.slow),
    ("eagle", {"num_steps": 2, "num_measured": 2, "feature_weight": 0.3}),
]


@pytest.mark.parametrize(("kind", "options"), CASES)
def test_loss_and_gradients_are_those_of_loops(kind, options):
    model = build(kind, **options)
    model.view.model.double()
    model.heads.double()
    assert model.heads.config.num_key_value_heads < model.heads.config.num_attention_heads
    output = model(**batch_of())
    output["loss"].backward()
    found = {name: parameter.grad.clone() for name, parameter in model.heads.named_parameters()}
    model.zero_grad()
    loss, ranks, counts = reference(model.heads, model.view.model, ROWS, model.objective)
    loss.backward()
    assert output["loss"].item() == pytest.approx(loss.item(), abs=CLOSE)
    assert set(found) == {name for name, _ in model.heads.named_parameters()}
    for name, parameter in model.heads.named_parameters():
        assert parameter.grad.abs().max() > 10 * CLOSE, name  # or else nothing is compared
        torch.testing.assert_close(found[name], parameter.grad, atol=CLOSE, rtol=0, msg=name)
    assert output["counts"].tolist() == counts
    for row, expected in enumerate(ranks):
        assert output["ranks"][row, : len(expected)].tolist() == expected.tolist()
        assert bool((output["ranks"][row, len(expected) :] == -1).all())


def test_heads_of_eagle_that_share_rows_of_the_output_matrix_learn_as_with_copies():
    model = build("eagle", draft_vocab_size=12, num_steps=2, num_measured=2)
    base, shared = model.view.model, model.heads
    copies = EagleHeads(replace(shared.config, has_own_lm_head=True))
    rows = base.get_output_embeddings().weight.detach()[shared.draft_columns]
    copies.load_state_dict({**shared.state_dict(), "lm_head.weight": rows})
    other = EagleTrainingModel(base, copies, objective=model.objective)
    found, expected = model(**batch_of()), other(**batch_of())
    torch.testing.assert_close(found["loss_sums"], expected["loss_sums"])
    assert torch.equal(found["ranks"], expected["ranks"])
    assert bool((found["ranks"] > 0).any())


def test_heads_of_eagle3_learn_no_features():
    with pytest.raises(OptionError, match=r"feature_weight is 1\.0, expected 0"):
        build("eagle3", feature_weight=1.0)


def test_targets_that_the_heads_cannot_guess_are_left_out_of_the_loss():
    model = build("eagle3", draft_vocab_size=12, num_steps=3, num_measured=3)
    output = model(**batch_of())
    asked = (output["ranks"] >= 0).sum((0, 1))
    assert bool((output["counts"] < asked).all())
    assert bool((output["ranks"] <= 12).all())


@pytest.mark.parametrize("token", [2, 5, 9])
def test_mask_of_one_token_trains_the_slots_that_guess_it(token):
    mask = [int(index == token) for index in range(10)]
    model = build("eagle3", num_steps=3, num_measured=3)
    output = model(**batch_of([(ROWS[1][0], mask)]))
    slots = (output["ranks"][0] >= 0).nonzero().tolist()
    assert slots == sorted([token - 2 - step, step] for step in range(3) if token - 2 - step >= 0)
    assert output["counts"].tolist() == [int(token - 2 - step >= 0) for step in range(3)]
    whole = model(**batch_of())
    assert output["loss"] != whole["loss"]


@pytest.mark.parametrize("kind", KINDS)
def test_padding_and_other_rows_change_nothing(kind):
    model = build(kind, num_steps=2, num_measured=3)
    alone = [model(**batch_of([row])) for row in ROWS]
    together = model(**batch_of())
    sums = alone[0]["loss_sums"] + alone[1]["loss_sums"]
    torch.testing.assert_close(together["loss_sums"], sums, atol=CLOSE * 100, rtol=CLOSE)
    assert torch.equal(together["ranks"][0, :7], alone[0]["ranks"][0])


def test_steps_that_are_only_measured_have_ranks_and_no_gradient():
    output = build("eagle", num_steps=1, num_measured=3)(**batch_of())
    assert output["loss_sums"].shape == (1,)
    assert bool((output["ranks"][..., 2] >= 0).any())


@pytest.mark.parametrize("kind", KINDS)
def test_steps_without_a_target_add_nothing(kind):
    model = build(kind, num_steps=3, num_measured=3)
    output = model(**batch_of([([1, 2, 3], [0, 0, 1])]))
    assert output["counts"].tolist() == [1, 0, 0]
    torch.testing.assert_close(output["loss"], output["loss_sums"][0])
    output["loss"].backward()
    assert bool(model.heads.fc.weight.grad.isfinite().all())


def test_noise_is_on_features_in_training_alone():
    base = tiny_base()
    objective = replace(EagleObjective.usual("eagle"), noise=0.2)
    model = EagleTrainingModel(base, heads_of(base, "eagle"), objective=objective)
    model.eval()
    assert model(**batch_of())["loss"] == model(**batch_of())["loss"]
    model.train()
    torch.manual_seed(0)
    assert model(**batch_of())["loss"] != model(**batch_of())["loss"]
    features = torch.zeros(1, 256, 16)
    noise = model._with_noise(features)
    assert 0.19 < noise.max() <= 0.2  # a text half as long gets twice the noise
    assert noise.min() < -0.19


def test_chunks_change_neither_loss_nor_gradient(monkeypatch):
    model = build("eagle3", draft_vocab_size=12, num_steps=3, num_measured=3)
    whole = model(**batch_of())
    whole["loss"].backward()
    gradient = model.heads.fc.weight.grad.clone()
    model.zero_grad()
    monkeypatch.setattr(training_model, "MAX_LOGITS", 12 * 3 * 2)  # two rows at a time
    chunked = model(**batch_of())
    chunked["loss"].backward()
    torch.testing.assert_close(chunked["loss"], whole["loss"], atol=CLOSE, rtol=0)
    torch.testing.assert_close(model.heads.fc.weight.grad, gradient, atol=CLOSE, rtol=0)
    assert torch.equal(chunked["ranks"], whole["ranks"])


def test_only_the_heads_own_layers_are_trained():
    base = tiny_base()
    config = EagleConfig.from_model_config(base.config, kind="eagle")
    heads = EagleHeads(replace(config, has_own_embeddings=True))
    heads.init_weights_(embeddings=base.get_input_embeddings().weight)
    model = EagleTrainingModel(base, heads, objective=EagleObjective.usual("eagle"))
    model.train()
    assert not model.view.model.training
    model(**batch_of())["loss"].backward()
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {"heads.embed_tokens.weight"}
    assert all(p.grad is None for p in base.parameters())
    assert set(model.state_dict()) == {f"heads.{name}" for name in heads.state_dict()}


@pytest.mark.parametrize("kind", KINDS)
def test_heads_in_float32_train_on_a_narrower_base(kind):
    model = build(kind)
    model.view.model.to(torch.bfloat16)
    output = model(**batch_of())
    assert output["loss"].dtype == torch.float32
    output["loss"].backward()
    assert model.heads.fc.weight.grad.dtype == torch.float32


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("num_steps", 0, "num_steps is 0, expected 1 to 32"),
        ("num_measured", 1, "num_measured is 1, expected 7 to 32"),
        ("decay", 1.5, "decay is 1.5, expected 0.0 to 1.0"),
        ("noise", -1.0, "noise is -1.0, expected 0.0 to"),
    ],
)
def test_objectives_out_of_range_are_refused(option, value, words):
    with pytest.raises(OptionError, match=words):
        EagleObjective(**{option: value})


class Watcher:
    """Records what heads read and say while decoding, and makes every draft token right."""

    def __init__(self, heads, text):
        self.heads, self.text = heads, text
        self.features, self.logits = {}, {}
        self.pending, self.position, self.level = None, -1, 0  # of the last slot
        self._fuse, self._logits = heads.fuse, heads.logits
        heads.fuse, heads.logits = self.fuse, self.guess
        self._handle = heads.register_forward_hook(self.after)

    def stop(self):
        self._handle.remove()
        del self.heads.fuse, self.heads.logits

    def fuse(self, features):
        self.pending = features.flatten(0, -2)  # of one row
        return self._fuse(features)

    def after(self, heads, arguments, output):
        if self.pending is None:
            self.level += 1
            return
        self.level = 0
        for read in self.pending:
            self.position += 1
            self.features[self.position] = read
        self.pending = None

    def guess(self, hidden, *, lm_head):
        logits = self._logits(hidden, lm_head=lm_head)
        assert logits.shape[:-1].numel() == 1  # a chain, of one row
        self.logits[self.position, self.level] = logits.flatten()
        target = self.position + 2 + self.level
        forced = torch.full_like(logits, -100.0)
        columns = self.heads.draft_columns
        token = self.text[target] if target < len(self.text) else 0
        column = token if columns is None else columns.tolist().index(token)
        forced[..., column] = 100.0
        return forced


@pytest.mark.parametrize("kind", KINDS)
def test_training_reads_and_computes_what_decoding_does(kind):
    base, steps = tiny_base().double(), 3  # rounding of float32 grows with each layer
    inputs = prompts(5, vocab_size=VOCAB)
    settings = {"max_new_tokens": 22, "do_sample": False}
    said = base.generate(**inputs, **settings)
    columns = torch.unique(torch.cat([said[0], torch.tensor([0])])) if kind == "eagle3" else None
    heads = new_eagle_heads(
        base, kind=kind, columns=columns, feature_layers=LAYERS if columns is not None else None
    )
    heads.double()
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.mul_(1 if parameter.ndim == 1 else 8)
    chain = {"width": 1, "branches": 1, "min_probability": 0.0, "min_confidence": 0.0}
    proposer = EagleProposer(heads, target=base, depth=steps, num_draft_tokens=steps, **chain)
    watcher = Watcher(heads, said[0].tolist())
    spec = SpecModel(base, proposer, adaptive=False)
    assert torch.equal(spec.generate(**inputs, **settings), said)
    watcher.stop()
    assert spec.last_speculation.tau > steps  # the guesses were right

    objective = EagleObjective(num_steps=steps, num_measured=steps)
    model = EagleTrainingModel(base, heads, objective=objective)
    features, _ = model.read_base(said, torch.ones_like(said), model._layers)
    assert set(range(16)) <= set(watcher.features)
    for position, seen in watcher.features.items():
        torch.testing.assert_close(seen, features[0, position], atol=CLOSE, rtol=0)
    slots = torch.arange(said.shape[1] - 1)[None]
    outputs = roll_out(heads, features, said, slots, num_steps=steps, embedding=model._embed)
    trained = [heads.logits(hidden, lm_head=model.lm_head)[0] for hidden in outputs]
    inside = [(t, k) for t, k in watcher.logits if t + 1 + k < said.shape[1]]
    assert {k for _, k in inside} == set(range(steps))
    assert len(inside) > 12
    for t, k in inside:
        torch.testing.assert_close(watcher.logits[t, k], trained[k][t], atol=CLOSE, rtol=0)


def test_feature_loss_is_square_near_zero_and_linear_beyond_one():
    found = feature_loss(torch.tensor([[0.5, 3.0]]), torch.zeros(1, 2))
    assert found.item() == pytest.approx((0.125 + 2.5) / 2, abs=CLOSE)


@pytest.mark.parametrize("kind", KINDS)
def test_losses_of_accumulated_batches_add_up(kind):
    model = build(kind, num_steps=2, num_measured=2)
    require_sum_of_parts(model, [{"input_ids": row, "loss_mask": mask} for row, mask in ROWS])
