import pytest
import torch

from speclm import SpecModel
from speclm.errors import CheckpointError, OptionError, VocabularyMismatchError
from speclm.methods.eagle.proposer import EagleProposer
from speclm.methods.eagle.training import new_eagle_heads
from speclm.methods.medusa.checkpoint import read_medusa
from speclm.methods.medusa.checkpoint_writing import write_medusa
from speclm.methods.medusa.network import MedusaHeads, MedusaHeadsConfig, medusa_checkpoint
from speclm.methods.medusa.proposer import STATIC_TREE
from speclm.methods.medusa.training import (
    MedusaObjective,
    MedusaTrainingModel,
    load_medusa_heads,
    new_medusa_heads,
)
from speclm.training import training_model
from speclm.training.arguments import training_arguments
from speclm.training.conversations import Example
from speclm.training.dataset import ExampleDataset, collate_examples, load_examples
from speclm.training.heads_trainer import HeadsTrainer
from speclm.training.targets import IGNORED, shifted_targets
from speclm.tree.static import trim_paths
from tests.models import build_model, prompts, shared_model
from tests.training.alphabet import TAGGED, WORDS, tiny_base, word_tokenizer, write_alphabet
from tests.training.runs import SETTINGS, require_sum_of_parts

NEAR = 1e-4  # float32, logits of about 30
LENGTHS = (9, 14)


@pytest.fixture
def make(tmp_path):
    def make_trainer(*, objective=None, num_layers=1, has_own_lm_head=False, **settings):
        base = tiny_base()
        heads = new_medusa_heads(
            base, num_heads=2, num_layers=num_layers, has_own_lm_head=has_own_lm_head
        )
        return HeadsTrainer(
            MedusaTrainingModel(base, heads, objective=objective),
            training_arguments(tmp_path / "out", {**SETTINGS, **settings}),
            train_dataset=load_examples(
                write_alphabet(tmp_path / "rows.jsonl"), word_tokenizer(TAGGED)
            ),
        )

    return make_trainer


def test_heads_that_learn_texts_of_others_get_a_low_estimate(make):
    trainer = make(max_steps=60, learning_rate=0.02, lr_scheduler_type="constant", warmup_steps=0)
    trainer.train()
    first, last = trainer.state.log_history[0], trainer.state.log_history[-2]
    assert last["loss"] < first["loss"] / 4
    # The texts are learned by heart, and decoding would not follow them.
    assert last["base_agreement"] < 0.2
    assert last["estimated_tau"] < 1.3


def test_heads_that_learned_draft_what_the_base_says_and_are_estimated_as_decoded(tmp_path, make):
    trainer = make(max_steps=40, learning_rate=0.02, lr_scheduler_type="constant", warmup_steps=0)
    base = trainer.model.view.model
    inputs = prompts(3, vocab_size=len(WORDS))
    said = base.generate(**inputs, max_new_tokens=24, do_sample=False)
    mask = [0] * 3 + [1] * 24
    example = Example(input_ids=said[0].tolist(), loss_mask=mask)
    trainer.train_dataset = ExampleDataset([example] * 4)
    trainer.train()
    trainer.save_model()
    metrics = trainer.evaluate(trainer.train_dataset)
    assert metrics["eval_base_agreement"] == 1.0
    tree = trim_paths(STATIC_TREE, max_depth=2)
    spec = SpecModel.from_pretrained(base, tmp_path / "out", heads_kwargs={"tree": tree})
    assert torch.equal(spec.generate(**inputs, max_new_tokens=24, do_sample=False), said)
    assert spec.last_speculation.tau > 2
    assert spec.last_speculation.tau == pytest.approx(metrics["eval_estimated_tau"], rel=NEAR)


@pytest.mark.parametrize("has_own_lm_head", [False, True])
def test_saved_heads_are_those_that_were_trained(tmp_path, make, has_own_lm_head):
    trainer = make(has_own_lm_head=has_own_lm_head, max_steps=2)
    trainer.train()
    trainer.save_model()
    trained, saved = trainer.heads.state_dict(), read_medusa(tmp_path / "out")
    stacked = saved.stacked()
    assert trained["weight"].any()
    assert set(stacked) == set(trained)
    assert all(torch.equal(stacked[name], value) for name, value in trained.items())
    assert saved.vocab_size == len(WORDS)
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_soft_targets_train_too(make):
    objective = MedusaObjective(soft_weight=0.5)
    trainer = make(objective=objective, num_layers=2, has_own_lm_head=True, max_steps=10)
    trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history[:10]]
    assert losses[-1] < losses[0]


def test_heads_of_another_base_are_refused():
    with pytest.raises(VocabularyMismatchError, match="heads are for a vocabulary of 160"):
        MedusaTrainingModel(tiny_base(), new_medusa_heads(shared_model("llama")))
    narrow = MedusaHeads(MedusaHeadsConfig(hidden_size=8, vocab_size=len(WORDS)))
    with pytest.raises(OptionError, match="heads are 8 wide"):
        MedusaTrainingModel(tiny_base(), narrow)


def test_training_goes_on_from_saved_heads_of_any_layout(tmp_path, make):
    trainer = make(max_steps=2, num_layers=2, has_own_lm_head=True)
    trainer.train()
    trainer.save_model()
    state = read_medusa(tmp_path / "out").stacked()
    legacy = {  # FasterDecoding's, in 16 bits and without a config
        f"{head}.{layer}.linear.{part}": state[part][layer, head].bfloat16()
        for head in range(2)
        for layer in range(2)
        for part in ("weight", "bias")
    } | {f"{head}.2.weight": state["lm_weight"][head].bfloat16() for head in range(2)}
    (tmp_path / "legacy").mkdir()
    torch.save(legacy, tmp_path / "legacy" / "medusa_lm_head.pt")
    for folder, close in (("out", 0.0), ("legacy", 0.01)):
        heads = load_medusa_heads(tiny_base(), tmp_path / folder)
        assert heads.config == trainer.heads.config
        for name, tensor in trainer.heads.state_dict().items():
            torch.testing.assert_close(heads.state_dict()[name], tensor, atol=close, rtol=close)
        assert all(p.dtype == torch.float32 and p.requires_grad for p in heads.parameters())


def test_heads_to_start_from_have_to_fit_the_base(tmp_path):
    for name, width, vocab_size in (("narrow", 8, len(WORDS)), ("other", 40, 99)):
        config = MedusaHeadsConfig(hidden_size=width, vocab_size=vocab_size)
        write_medusa(tmp_path / name, medusa_checkpoint(MedusaHeads(config)))
    with pytest.raises(OptionError, match="heads are 8 wide"):
        load_medusa_heads(tiny_base(), tmp_path / "narrow")
    with pytest.raises(VocabularyMismatchError, match="heads are for a vocabulary of 99"):
        load_medusa_heads(tiny_base(), tmp_path / "other")
    base = build_model("llama", vocab_size=len(WORDS), num_hidden_layers=4)
    heads = new_eagle_heads(base, kind="eagle")
    SpecModel(base, EagleProposer(heads, target=base)).save_pretrained(tmp_path / "eagle")
    with pytest.raises(OptionError, match=r"of the method 'eagle', expected Medusa heads"):
        load_medusa_heads(base, tmp_path / "eagle")
    (tmp_path / "narrow" / "medusa_lm_head.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError):
        load_medusa_heads(tiny_base(), tmp_path / "narrow")


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(1, 30, (length,), generator=generator).tolist() for length in LENGTHS]
    return collate_examples(
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
    torch.testing.assert_close(means, expected, atol=NEAR, rtol=0)
    weights = torch.tensor([1.0, 0.5, 0.25])
    torch.testing.assert_close(output["loss"], (weights * expected).sum(), atol=NEAR, rtol=0)


def test_chunks_change_neither_loss_nor_gradient(batch, monkeypatch):
    model = build(soft_weight=0.3)
    whole = model(**batch)
    whole["loss"].backward()
    gradient = model.heads.weight.grad.clone()
    model.zero_grad()
    monkeypatch.setattr(training_model, "MAX_LOGITS", 3 * 30 * 4)  # four rows at a time
    chunked = model(**batch)
    chunked["loss"].backward()
    torch.testing.assert_close(chunked["loss"], whole["loss"], atol=NEAR, rtol=0)
    torch.testing.assert_close(model.heads.weight.grad, gradient, atol=NEAR, rtol=0)
    assert torch.equal(chunked["ranks"], whole["ranks"])
    assert torch.equal(chunked["base_tokens"], whole["base_tokens"])


def test_losses_of_accumulated_batches_add_up():
    examples = [
        Example(input_ids=[1, 2, 3, 4, 5, 6, 7, 8], loss_mask=[0, 0, 1, 1, 1, 1, 1, 1]),
        Example(input_ids=[9, 8, 7, 6], loss_mask=[0, 0, 0, 1]),
        Example(input_ids=[3, 1, 4, 1, 5, 9], loss_mask=[0, 1, 0, 1, 1, 0]),
    ]
    require_sum_of_parts(build(soft_weight=0.3), examples)


def test_ranks_stand_at_the_positions_of_their_hidden_states(batch):
    output = build()(**batch)
    targets = shifted_targets(batch["input_ids"], batch["loss_mask"], num_drafted=3)
    base, row = build().view.model, batch["input_ids"][:1, : LENGTHS[0]]
    assert output["base_tokens"][0, 5:9].equal(base(row).logits[0, 4:8].argmax(-1))
    assert torch.equal(output["base_tokens"] != IGNORED, batch["loss_mask"])
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


def test_without_soft_targets_base_logits_are_computed_once_where_a_token_counts(
    batch, monkeypatch
):
    model, asked = build(has_own_lm_head=True), []
    compute = model.view.head_logits
    monkeypatch.setattr(
        model.view, "head_logits", lambda states: [asked.append(len(states)), compute(states)][1]
    )
    model(**batch)
    assert asked == [batch["loss_mask"].sum()]


def test_heads_in_float32_train_on_a_narrower_base(batch):
    model = build()
    model.view.model.to(torch.bfloat16)
    output = model(**batch)
    assert output["loss"].dtype == torch.float32
    output["loss"].backward()
    assert model.heads.weight.grad.dtype == torch.float32


def test_batch_in_which_a_head_has_no_target_has_a_loss():
    rows = [{"input_ids": [1, 2, 3], "loss_mask": [0, 0, 1]}]
    output = build()(**collate_examples(rows))
    assert output["counts"].tolist() == [1, 0, 0]
    assert output["loss"].isfinite()


@pytest.mark.parametrize("option", ["decay", "soft_weight"])
@pytest.mark.parametrize("value", [-0.1, 1.1])
def test_shares_outside_zero_to_one_are_refused(option, value):
    with pytest.raises(OptionError, match=f"{option} is {value}, expected 0.0 to 1.0"):
        MedusaObjective(**{option: value})
