"""Medusa-2: both losses, their stages, and that the base keeps what it says."""

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from transformers import AutoModelForCausalLM, QuantoConfig

from speclm import SpecModel
from speclm.errors import OptionError
from speclm.methods.medusa.training import MedusaObjective, MedusaTrainingModel, new_medusa_heads
from speclm.methods.medusa.tuning import MedusaTuningModel, Stages, TuningObjective
from speclm.training.adapter import Adapter
from speclm.training.arguments import training_arguments
from speclm.training.conversations import Example
from speclm.training.dataset import ExampleDataset, collate_examples
from speclm.training.heads_trainer import HeadsTrainer
from tests.models import prompts
from tests.training.alphabet import WORDS, tiny_base
from tests.training.runs import CLOSE, SETTINGS, StopAt, require_sum_of_parts

# peft asks a Transformers model for an attribute by the name that it had before.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")

NEAR = 1e-4  # float32, logits of about 30
ROWS = [
    Example(input_ids=[3, 9, 4, 20, 7, 7, 2], loss_mask=[0, 0, 1, 1, 1, 1, 1]),
    Example(input_ids=[5, 1, 8, 23, 0, 6, 6, 14], loss_mask=[0, 0, 1, 1, 0, 0, 1, 1]),
]


@torch.no_grad()
def build(*, scale=0.1, **objective):
    """Return a model whose adapter and heads are not at their start."""
    base = tiny_base()
    heads = new_medusa_heads(base, num_heads=2)
    adapter = Adapter(base, rank=4, alpha=8.0)
    generator = torch.Generator().manual_seed(1)
    for parameter in (*adapter.parameters.values(), heads.weight):
        parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return MedusaTuningModel(base, heads, adapter, objective=TuningObjective(**objective))


@pytest.mark.parametrize("share", [1.0, 0.0, 0.3])
def test_loss_is_that_of_the_heads_and_of_the_base(share):
    model = build(distillation=share).eval()
    batch = collate_examples(ROWS)
    output = model(**batch)
    tokens, old = [], []
    base = model.view.model
    for row in ROWS:
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            after = base(ids).logits[0].log_softmax(-1)
            with model._adapter.off():
                before = base(ids).logits[0].log_softmax(-1)
        for position, token in enumerate(row["input_ids"]):
            if row["loss_mask"][position]:
                now, then = after[position - 1], before[position - 1]
                divergence = F.kl_div(now, then, log_target=True, reduction="sum")
                tokens.append((1 - share) * -now[token] + share * divergence)
                old.append(-then[token])
    own = MedusaTrainingModel(base, model.heads)(**batch)["loss"]
    expected = own + torch.stack(tokens).mean()
    torch.testing.assert_close(output["loss"], expected, atol=NEAR, rtol=0)
    total, count = output["figures"]["base_loss_before"].tolist()
    assert (total / count, count) == (pytest.approx(torch.stack(old).mean().item(), abs=NEAR), 9)


def test_heads_alone_are_trained_first_and_weigh_more_and_more_later():
    model = build(heads_warmup=0.5, heads_weight=0.4).train()
    weights = []
    for step in range(8):
        model.begin_step(step, 8)
        weights.append(model.adapter_weight)
    assert weights[:4] == [None] * 4
    assert weights[4:] == sorted(weights[4:])
    assert weights[-1] == pytest.approx(0.4)
    model.begin_step(0, 8)
    output = model(**collate_examples(ROWS))
    output["loss"].backward()
    assert "figures" not in output
    assert model.heads.weight.grad is not None
    assert all(parameter.grad is None for parameter in model.adapter.values())
    assert TuningObjective(heads_warmup=3.0).num_warmup_steps(8) == 3


def test_weight_of_the_heads_is_for_the_adapter_only():
    gradients = {}
    for weight in (0.0, 0.5, 1.0):
        model = build(heads_weight=weight, heads_warmup=0.0, distillation=0.0).eval()
        model(**collate_examples(ROWS))["loss"].backward()
        adapter = torch.cat([p.grad.flatten() for p in model.adapter.values()])
        gradients[weight] = adapter, model.heads.weight.grad
    torch.testing.assert_close(gradients[0.0][1], gradients[1.0][1])
    middle = (gradients[0.0][0] + gradients[1.0][0]) / 2
    torch.testing.assert_close(gradients[0.5][0], middle, atol=NEAR, rtol=NEAR)
    assert (gradients[0.0][0] - gradients[1.0][0]).abs().max() > 0.01


def test_losses_of_accumulated_batches_add_up():
    rows = [*ROWS, Example(input_ids=[1, 2, 3], loss_mask=[0, 0, 1])]
    require_sum_of_parts(build(heads_warmup=0.0, distillation=0.5).eval(), rows, atol=NEAR)


def test_only_dropout_of_the_adapter_is_switched_and_layers_may_recompute():
    model = build(heads_warmup=0.0).train()
    modes = {name for name, module in model.view.model.named_modules() if module.training}
    assert modes
    assert all(name.endswith("lora_dropout.default") for name in modes)
    for dropout in model._adapter.dropouts:
        dropout.p = 0.0
    batch = collate_examples(ROWS)
    model(**batch)["loss"].backward()
    expected = {name: p.grad.clone() for name, p in model.adapter.items()}
    model.zero_grad()
    model.activation_checkpointing_enable()
    model.train()
    model(**batch)["loss"].backward()
    for name, parameter in model.adapter.items():
        torch.testing.assert_close(parameter.grad, expected[name], atol=NEAR, rtol=NEAR)
    assert not any(module.training for module in model.eval().view.model.modules())


def test_adapter_of_a_base_in_16_bits_is_trained_in_32():
    base = tiny_base().bfloat16()
    model = MedusaTuningModel(base, new_medusa_heads(base, num_heads=2), Adapter(base, rank=4))
    output = model(**collate_examples(ROWS))
    output["loss"].backward()
    assert output["loss"].dtype == torch.float32
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}
    assert any(parameter.grad.any() for parameter in model.adapter.values())


def test_quantised_base_is_tuned_but_not_merged(tmp_path):
    tiny_base().save_pretrained(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=QuantoConfig(weights="int8"), device_map={"": "cpu"}
    )
    heads = new_medusa_heads(base, num_heads=2)
    adapter = Adapter(base, rank=4)
    with pytest.raises(OptionError, match=r"output is 'merged' and base .* is quantised"):
        MedusaTuningModel(base, heads, adapter, output="merged")
    MedusaTuningModel(base, heads, adapter)(**collate_examples(ROWS))["loss"].backward()
    assert any(parameter.grad.any() for parameter in adapter.parameters.values())


@pytest.fixture
def make(tmp_path):
    def make_trainer(*, folder="out", output="adapter", rows=ROWS, callbacks=(), **settings):
        base = tiny_base()
        heads = new_medusa_heads(base, num_heads=2)
        model = MedusaTuningModel(
            base,
            heads,
            Adapter(base, rank=8, alpha=8.0),
            output=output,
            objective=TuningObjective(),
        )
        quick = {"learning_rate": 0.005, "lr_scheduler_type": "constant", "warmup_steps": 0}
        return HeadsTrainer(
            model,
            training_arguments(tmp_path / folder, {**SETTINGS, **quick, **settings}),
            train_dataset=ExampleDataset(rows * 2),
            eval_dataset=ExampleDataset(rows),
            callbacks=[Stages(model), *callbacks],
        )

    return make_trainer


@pytest.mark.parametrize("output", ["adapter", "merged"])
def test_saved_parts_decode_as_the_tuned_base_does(make, tmp_path, output):
    base, inputs = tiny_base(), prompts(3, vocab_size=len(WORDS))
    said = base.generate(**inputs, max_new_tokens=24, do_sample=False)
    row = Example(input_ids=said[0].tolist(), loss_mask=[0] * 3 + [1] * 24)
    trainer = make(rows=[row] * 2, max_steps=30, output=output)
    trainer.train()
    figures = trainer.evaluate()
    assert figures["eval_base_loss"] < figures["eval_base_loss_before"] + 0.05
    assert 0 < figures["eval_base_divergence"] < 0.05
    trainer.save_model()
    if output == "merged":
        tuned = str(tmp_path / "out" / "base")
    else:
        tuned = PeftModel.from_pretrained(base, tmp_path / "out" / "adapter")
    spec = SpecModel.from_pretrained(tuned, tmp_path / "out", adaptive=False)
    options = {"max_new_tokens": 24, "do_sample": False}
    theirs = trainer.training_model.view.model.generate(**inputs, **options)
    assert torch.equal(spec.generate(**inputs, **options), theirs)
    assert spec.last_speculation.tau > 2
    lines = trainer.training_model.closing_lines(
        tmp_path / "out", {"base_loss_before": 2.0, "base_loss": 1.98}
    )
    assert lines[0] == "loss of the base on the same data: 2.0000 before, 1.9800 after (-1.0%)"
    part = {"adapter": "base with the adapter", "merged": "merged base"}[output]
    assert f"draft for the {part} in" in lines[1]


def test_resumed_training_ends_where_an_unbroken_one_does(make):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = make(folder="whole", **settings)
    whole.train()
    make(folder="broken", callbacks=[StopAt(2)], **settings).train()
    resumed = make(folder="broken", **settings)
    resumed.train(resume_from_checkpoint=True)
    state = whole.training_model.state_dict()
    assert any(name.startswith("adapter.") and value.any() for name, value in state.items())
    for name, value in state.items():
        found = resumed.training_model.state_dict()[name]
        torch.testing.assert_close(found, value, atol=CLOSE, rtol=0)


def test_settings_out_of_range_are_named():
    for name in ("distillation", "heads_warmup", "heads_weight", "heads_rate"):
        with pytest.raises(OptionError, match=f"{name} is -1.0"):
            TuningObjective(**{name: -1.0})
    with pytest.raises(OptionError, match=r"decay is 2.0, expected"):
        TuningObjective(heads=MedusaObjective(decay=2.0))
