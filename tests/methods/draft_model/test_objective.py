"""What draft models are distilled on, and the figures of their training."""

import pytest
import torch
import torch.nn.functional as F

from speclm import SpecModel
from speclm.errors import OptionError, VocabularyMismatchError
from speclm.methods.draft_model.objective import (
    DraftObjective,
    DraftTrainingModel,
    chain_ranks,
)
from speclm.methods.draft_model.training import new_draft_model
from speclm.training.arguments import training_arguments
from speclm.training.conversations import Example
from speclm.training.dataset import ExampleDataset, collate_examples
from speclm.training.heads_trainer import HeadsTrainer
from tests.models import build_model, prompts
from tests.training.alphabet import WORDS, tiny_base
from tests.training.runs import CLOSE, SETTINGS, StopAt, require_sum_of_parts

NEAR = 1e-4  # float32, logits of about 30
ROWS = [
    Example(input_ids=[3, 9, 4, 20, 7, 7, 2], loss_mask=[0, 0, 1, 1, 1, 1, 1]),
    Example(input_ids=[5, 1, 8, 23, 0, 6, 6, 14], loss_mask=[0, 0, 1, 1, 0, 0, 1, 1]),
]


def build(*, vocab_size=30, **objective):
    draft = build_model("llama", seed=3, num_hidden_layers=1, vocab_size=vocab_size)
    return DraftTrainingModel(tiny_base(), draft, objective=DraftObjective(**objective))


@torch.no_grad()
def losses_one_by_one(model, *, heat, weight, num_shared):
    """Return the mean loss and the ranks of the base's tokens, row by row without padding."""
    losses, ranks = [], []
    for row in ROWS:
        tokens = torch.tensor([row["input_ids"]])
        theirs = model.view.model(tokens).logits[0, :, :num_shared]
        read = tokens.clamp(max=model.draft_view.vocab_size - 1)
        ours = model.heads(read).logits[0, :, :num_shared]
        for position, token in enumerate(row["input_ids"]):
            if row["loss_mask"][position]:
                log_probs = (ours[position - 1] / heat).log_softmax(-1)
                wanted = (theirs[position - 1] / heat).log_softmax(-1)
                divergence = F.kl_div(log_probs, wanted, log_target=True, reduction="sum")
                own = F.cross_entropy(ours[position - 1][None], torch.tensor([token]))
                losses.append((1 - weight) * heat**2 * divergence + weight * own)
                chosen = theirs[position - 1].argmax()
                ranks.append(int((ours[position - 1] > ours[position - 1][chosen]).sum()))
    return torch.stack(losses).mean(), ranks


@pytest.mark.parametrize(
    ("heat", "weight", "vocab_size"), [(1.0, 0.0, 30), (2.0, 0.3, 30), (1.0, 0.0, 36)]
)
def test_loss_is_the_divergence_at_tokens_that_the_assistant_wrote(heat, weight, vocab_size):
    model = build(temperature=heat, token_weight=weight, vocab_size=vocab_size)
    output = model(**collate_examples(ROWS))
    loss, ranks = losses_one_by_one(model, heat=heat, weight=weight, num_shared=len(WORDS))
    torch.testing.assert_close(output["loss"], loss, atol=NEAR, rtol=0)
    assert output["counts"].tolist() == [9]
    found = output["ranks"][..., 0]  # the first drafted token is two after the hidden state
    assert [rank for rank in found.flatten().tolist() if rank >= 0] == ranks


def test_draft_model_that_equals_the_base_has_no_loss_and_only_its_weights_are_trained():
    model = DraftTrainingModel(tiny_base(), tiny_base())
    output = model(**collate_examples(ROWS))
    assert output["loss"].item() == pytest.approx(0.0, abs=NEAR)
    build_loss = build()(**collate_examples(ROWS))["loss"]
    build_loss.backward()
    assert not any(parameter.requires_grad for parameter in model.view.model.parameters())
    assert all(parameter.requires_grad for parameter in model.heads.parameters())


def test_losses_of_accumulated_batches_add_up():
    rows = [*ROWS, Example(input_ids=[1, 2, 3], loss_mask=[0, 0, 1])]
    require_sum_of_parts(build(token_weight=0.5), rows)


def test_chain_below_a_root_has_the_ranks_of_the_tokens_after_it():
    ranks = torch.tensor([[-1, 4, 0, 2, -1]])  # of tokens 1 to 5
    found = chain_ranks(ranks, num_drafted=2).tolist()
    # The root at position 1 is drafted from hidden state 0; token 2 ranks 4, token 3 ranks 0.
    assert found == [[[4, 0], [0, 2], [2, -1], [-1, -1], [-1, -1]]]


@pytest.fixture
def make(tmp_path):
    def make_trainer(*, folder="out", is_tied=True, callbacks=(), rows=None, **settings):
        base = tiny_base()
        draft = new_draft_model(base, hidden_size=32, num_layers=1, num_heads=2, is_tied=is_tied)
        quick = {"learning_rate": 0.01, "lr_scheduler_type": "constant", "warmup_steps": 0}
        return HeadsTrainer(
            DraftTrainingModel(base, draft),
            training_arguments(tmp_path / folder, {**SETTINGS, **quick, **settings}),
            train_dataset=ExampleDataset(rows or ROWS * 2),
            callbacks=callbacks,
        )

    return make_trainer


def test_draft_model_learns_what_the_base_says_and_drafts_it(make, tmp_path):
    base, inputs = tiny_base(), prompts(3, vocab_size=len(WORDS))
    said = base.generate(**inputs, max_new_tokens=16, do_sample=False)
    row = Example(input_ids=said[0].tolist(), loss_mask=[0] * 3 + [1] * 16)
    trainer = make(rows=[row] * 4, max_steps=50)
    trainer.training_model.activation_checkpointing_enable()
    trainer.train()
    first, last = trainer.state.log_history[0], trainer.state.log_history[-2]
    assert last["token0_loss"] < first["token0_loss"] / 4
    assert last["estimated_tau"] > 2.5
    assert "token1_top1" not in last  # a draft model reads its own tokens: all ranks are alike
    trainer.save_model()
    spec = SpecModel.from_pretrained(base, tmp_path / "out", adaptive=False)
    assert torch.equal(spec.generate(**inputs, max_new_tokens=16, do_sample=False), said)
    assert spec.last_speculation.tau > 2


@pytest.mark.parametrize("is_tied", [True, False])
def test_resumed_training_ends_where_an_unbroken_one_does(make, is_tied):
    settings = {"is_tied": is_tied, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = make(folder="whole", **settings)
    whole.train()
    make(folder="broken", callbacks=[StopAt(2)], **settings).train()
    resumed = make(folder="broken", **settings)
    resumed.train(resume_from_checkpoint=True)
    assert ("heads.lm_head.weight" in whole.training_model.state_dict()) != is_tied
    for name, value in whole.heads.state_dict().items():
        torch.testing.assert_close(resumed.heads.state_dict()[name], value, atol=CLOSE, rtol=0)


def test_models_of_another_vocabulary_and_bad_settings_are_refused():
    with pytest.raises(VocabularyMismatchError, match="has a vocabulary of 160"):
        build(vocab_size=160)
    with pytest.raises(OptionError, match=r"token_weight is 1.5, expected 0.0 to 1.0"):
        DraftObjective(token_weight=1.5)
    with pytest.raises(OptionError, match=r"temperature is 0.0, expected a finite number above 0"):
        DraftObjective(temperature=0.0)
