"""What a training says before its first step."""

import pytest
import torch

from speclm.methods.medusa.training import MedusaTrainingModel, new_medusa_heads
from speclm.training.arguments import training_arguments
from speclm.training.conversations import Example
from speclm.training.run_summary import Agreement, announce_agreement, measure_agreement, summarize
from tests.training.alphabet import tiny_base
from tests.training.runs import SETTINGS

MASK = [0, 0, 0, 1, 1, 1, 1, 1, 1]


@pytest.fixture
def model():
    base = tiny_base()
    return MedusaTrainingModel(base, new_medusa_heads(base, num_heads=2))


@pytest.fixture
def said(model):
    prompt = torch.tensor([[5, 6, 7]])
    options = {"min_new_tokens": 6, "max_new_tokens": 6, "do_sample": False}
    return model.view.model.generate(prompt, **options)[0].tolist()


def test_summary_counts_parameters_tokens_and_bytes(model, tmp_path):
    rows = [Example(input_ids=[1] * 9, loss_mask=MASK)] * 3
    args = training_arguments(tmp_path, SETTINGS)
    found = summarize(model, args, dataset=rows, num_steps=1500)
    num_base = sum(parameter.numel() for parameter in model.view.model.parameters())
    num_heads = sum(parameter.numel() for parameter in model.heads.parameters())
    assert (found.num_frozen, found.num_trained) == (num_base, num_heads)
    assert (found.num_examples, found.num_tokens) == (3, 18)
    assert found.weight_bytes >= 4 * (num_base + num_heads)
    assert (found.gradient_bytes, found.optimizer_bytes) == (4 * num_heads, 8 * num_heads)
    assert "1,500 optimizer steps" in found.lines()[1]
    unknown = training_arguments(tmp_path, {**SETTINGS, "optim": "adafactor"})
    found = summarize(model, unknown, dataset=iter(rows), num_steps=3)
    assert (found.num_examples, found.num_tokens, found.optimizer_bytes) == (None, None, None)
    assert "a stream of examples" in found.lines()[1]
    assert "optimizer unknown" in found.lines()[2]


def test_agreement_is_the_share_of_tokens_that_the_base_would_write(model, said):
    own = Example(input_ids=said, loss_mask=MASK)
    assert measure_agreement(model, [own] * 3, batch_size=2) == Agreement(1.0, 3)
    last = said[-1]
    changed = Example(input_ids=[*said[:-1], (last + 1) % 30], loss_mask=MASK)
    assert measure_agreement(model, [own, changed], batch_size=1) == Agreement(11 / 12, 2)
    assert measure_agreement(model, iter([own]), batch_size=1) is None


def test_agreement_is_measured_on_a_sample_and_ends_in_time(model, said):
    rows = [Example(input_ids=said, loss_mask=MASK)] * 200
    seconds, asked = iter((0.0, 1.0, 21.0)), []

    class Counted(list):
        def __getitem__(self, index):
            asked.append(index)
            return super().__getitem__(index)

    found = measure_agreement(model, Counted(rows), batch_size=2, clock=lambda: next(seconds))
    assert found == Agreement(1.0, 4)
    assert asked == [0, 3, 6, 9]  # two forwards, spread over all rows


def test_low_agreement_warns_and_no_agreement_says_nothing(caplog):
    said = []
    announce_agreement(None, said.append)
    assert (said, caplog.messages) == ([], [])
    announce_agreement(Agreement(0.7, 9), said.append)
    assert said == ["the base itself would write 70% of the answers' tokens (9 examples)"]
    announce_agreement(Agreement(0.69, 1), said.append)
    assert "69% of the answers' tokens (1 example), expected 70% or more" in caplog.text
