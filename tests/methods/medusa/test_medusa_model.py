import pytest
import torch

from speclm.errors import OptionError
from speclm.methods.medusa import training as module
from speclm.methods.medusa.loss import IGNORED, shifted_targets
from speclm.methods.medusa.training import MedusaObjective, MedusaTrainingModel, new_medusa_heads
from speclm.training.rows import collate_rows
from tests.training.talks import tiny_base

CLOSE = 1e-4  # float32, logits of about 30
LENGTHS = (9, 14)


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(1, 30, (length,), generator=generator).tolist() for length in LENGTHS]
    return collate_rows(
        [{"input_ids": row, "loss_mask": [0] * 5 + [1] * (len(row) - 5)} for row in rows]
    )


def build(*, num_heads=3, soft_weight=0.0, **options):
    base = tiny_base()
    heads = new_medusa_heads(base, num_heads=num_heads, **options)
    with torch.no_grad():  # fresh heads all say the same
        heads.weight.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
    objective = MedusaObjective(decay=0.5, soft_weight=soft_weight)
    return MedusaTrainingModel(base, heads, objective=objective)


@torch.no_grad()
def losses_one_by_one(model, batch):
    """Return the mean loss of each head, computed row by row without padding."""
    base, heads, soft = model.view.model, model.heads, model.objective.soft_weight
    found = [[] for _ in range(heads.num_heads)]
    for row, length in enumerate(LENGTHS):
        tokens = batch["input_ids"][row, :length]
        output = base(tokens[None], output_hidden_states=True)
        logits = heads(output.hidden_states[-1][0], lm_head=base.lm_head)
        distributions = output.logits[0].softmax(-1)
        for head in range(heads.num_heads):
            for t in range(length):
                target = t + 2 + head
                if target < length and batch["loss_mask"][row, target]:
                    log_probs = logits[t, head].log_softmax(-1)
                    hard, gentle = (
                        -log_probs[tokens[target]],
                        -(distributions[target - 1] @ log_probs),
                    )
                    found[head].append((1 - soft) * hard + soft * gentle)
    return torch.stack([torch.stack(losses).mean() for losses in found])


@pytest.mark.parametrize("has_own_lm_head", [False, True])
@pytest.mark.parametrize("soft_weight", [0.0, 0.4])
def test_loss_is_that_of_rows_computed_one_by_one(batch, soft_weight, has_own_lm_head):
    model = build(soft_weight=soft_weight, has_own_lm_head=has_own_lm_head)
    output = model(**batch)
    expected = losses_one_by_one(model, batch)
    means = output["loss_sums"] / output["counts"]
    torch.testing.assert_close(means, expected, atol=CLOSE, rtol=0)
    weights = torch.tensor([1.0, 0.5, 0.25])
    torch.testing.assert_close(output["loss"], (weights * expected).sum(), atol=CLOSE, rtol=0)


def test_chunks_change_neither_loss_nor_gradient(batch, monkeypatch):
    model = build(soft_weight=0.3)
    whole = model(**batch)
    whole["loss"].backward()
    gradient = model.heads.weight.grad.clone()
    model.zero_grad()
    monkeypatch.setattr(module, "MAX_LOGITS", 3 * 30 * 4)  # four rows at a time
    chunked = model(**batch)
    chunked["loss"].backward()
    torch.testing.assert_close(chunked["loss"], whole["loss"], atol=CLOSE, rtol=0)
    torch.testing.assert_close(model.heads.weight.grad, gradient, atol=CLOSE, rtol=0)
    assert torch.equal(chunked["ranks"], whole["ranks"])


def test_ranks_stand_at_the_positions_of_their_hidden_states(batch):
    output = build()(**batch)
    targets = shifted_targets(batch["input_ids"], batch["loss_mask"], num_heads=3)
    assert torch.equal(output["ranks"] >= 0, targets != IGNORED)
    assert torch.equal(output["counts"], (targets != IGNORED).sum((0, 1)))


def test_only_heads_are_trained_and_saved(batch):
    model = build()
    model.train()
    assert not model.view.model.training
    assert set(model.state_dict()) == {"heads.weight", "heads.bias"}
    model(**batch)["loss"].backward()
    assert all(p.grad is not None for p in model.parameters())
    assert all(p.grad is None and not p.requires_grad for p in model.view.model.parameters())


def test_base_logits_are_computed_only_for_soft_targets(batch, monkeypatch):
    model = build(has_own_lm_head=True)
    monkeypatch.setattr(model.view, "head_logits", None)
    model(**batch)


def test_heads_in_float32_train_on_a_narrower_base(batch):
    model = build()
    model.view.model.to(torch.bfloat16)
    output = model(**batch)
    assert output["loss"].dtype == torch.float32
    output["loss"].backward()
    assert model.heads.weight.grad.dtype == torch.float32


def test_batch_in_which_a_head_has_no_target_has_a_loss():
    rows = [{"input_ids": [1, 2, 3], "loss_mask": [0, 0, 1]}]
    output = build()(**collate_rows(rows))
    assert output["counts"].tolist() == [1, 0, 0]
    assert output["loss"].isfinite()


@pytest.mark.parametrize("option", ["decay", "soft_weight"])
@pytest.mark.parametrize("value", [-0.1, 1.1])
def test_shares_outside_zero_to_one_are_refused(option, value):
    with pytest.raises(OptionError, match=f"{option} is {value}, expected 0.0 to 1.0"):
        MedusaObjective(**{option: value})
