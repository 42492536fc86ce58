"""What EAGLE heads know of the committed tokens, and how they run over levels."""

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from speclm import SpecModel
from speclm.acceptance import Accepted
from speclm.devices import device_path
from speclm.drafting.interface import Prefill
from speclm.methods.eagle.context import EagleContext
from speclm.methods.eagle.network import EagleHeads
from speclm.methods.eagle.proposer import EagleProposer
from speclm.target import TargetView
from tests.methods.eagle.eagle_heads import heads_for
from tests.models import build_model, generate, prompts
from tests.proposers import HittingProposer

LAYERS = (1, 2, 3)
TOLERANCE = 1e-5  # of the largest number
FULL = {"depth": 6, "width": 3, "min_probability": 0.0, "min_confidence": 0.0, "min_growing": 0.0}


@pytest.mark.parametrize(
    ("kind", "on_device"), [("eagle", False), ("eagle3", False), ("eagle3", True)]
)
def test_accepted_paths_of_all_lengths_leave_the_features_that_training_sees(
    kind, on_device, monkeypatch
):
    model = build_model("llama", num_hidden_layers=4)
    heads = heads_for(model, kind, layers=LAYERS, draft_vocab_size=40 if kind == "eagle3" else None)
    inputs, settings = prompts(7, 3, 10), {"max_new_tokens": 16, "do_sample": False}
    expected = generate(model, inputs, **settings)[0]
    padding = (inputs["attention_mask"] == 0).sum(1).tolist()
    eagle = EagleProposer(heads, target=model, **FULL)
    proposer = HittingProposer(eagle, expected[:, 10:].tolist())
    seen: list[int] = []
    original = EagleContext.catch_up

    def checked(self: EagleContext, **options: int | None) -> None:
        original(self, **options)
        for row, start in enumerate(padding):
            length = self.cache.host_lengths[row] + 1  # tokens whose features are joined
            wanted = last_output(model, heads, expected[row, start:length])
            assert (self.hidden[row] - wanted).abs().max() < TOLERANCE * wanted.abs().max()
            seen.append(length)

    monkeypatch.setattr(EagleContext, "catch_up", checked)
    with device_path() if on_device else nullcontext():
        found = generate(SpecModel(model, proposer), inputs, **settings)
    assert torch.equal(found[0], expected)
    assert len(set(seen)) > 6


@torch.no_grad()
def last_output(model: PreTrainedModel, heads: EagleHeads, tokens: Tensor) -> Tensor:
    """Return the heads' output behind a text, from one pass as in training."""
    states = model(input_ids=tokens[None], output_hidden_states=True).hidden_states
    layers = LAYERS if heads.config.kind == "eagle3" else (-1,)
    features = torch.cat([states[layer] for layer in layers], dim=-1)[:, :-1]
    embeddings = model.get_input_embeddings()(tokens[None, 1:])
    positions = torch.arange(len(tokens) - 1)[None]
    return heads(heads.fuse(features), embeddings, position_ids=positions)[0, -1]


EMITTED = [[[5, 6], [7]], [[], [8, 9, 10]], [[11], [12]]]


def context_of(model: PreTrainedModel, heads: EagleHeads, *, rows: int) -> EagleContext:
    """Return a context that has read a prompt."""
    inputs = prompts(*(6, 4)[:rows])
    tokens, mask = inputs["input_ids"], inputs["attention_mask"]
    width = model.config.hidden_size * len(LAYERS)
    context = EagleContext(heads.fuse_(), TargetView(model))
    context.begin(
        Prefill(
            tokens=tokens[:, :-1],
            num_padding=(mask == 0).sum(1),
            first_tokens=tokens[:, -1],
            temperature=0.0,
            max_new_tokens=20,
            features=drawn(rows, tokens.shape[1] - 1, width),
        )
    )
    return context


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def commit(context: EagleContext, emitted: list[list[int]], *, on_device: bool) -> None:
    """Commit the tokens of a round, as it is decided on the host or on the device."""
    width = max(map(len, emitted))
    accepted = Accepted.from_host(
        [list(range(len(row))) for row in emitted], emitted, device=torch.device("cpu")
    )
    if on_device:
        padded = torch.tensor([row + [-1] * (width - len(row)) for row in emitted])
        path = torch.arange(width).expand(len(emitted), -1).where(padded >= 0, -1)
        accepted = Accepted(path, padded)
    hidden = context._heads.config.target_hidden_size * len(LAYERS)
    # Features of more positions than were emitted, as of a path that was cut.
    context.commit(accepted.with_path_features(drawn(len(emitted), width + 1, hidden)))


@torch.no_grad()
@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("rows", [1, 2])
def test_rounds_without_a_draft_are_read_together_by_the_next_one(rows, on_device):
    model = build_model("llama", num_hidden_layers=4)
    heads = heads_for(model, "eagle3", layers=LAYERS)
    at_once, by_round = (context_of(model, heads, rows=rows) for _ in range(2))
    for emitted in EMITTED:
        commit(at_once, emitted[-rows:], on_device=on_device)
        commit(by_round, emitted[-rows:], on_device=False)
        by_round.catch_up()
    at_once.catch_up()
    at_once.catch_up()  # nothing is new
    assert at_once.cache.host_lengths == by_round.cache.host_lengths
    torch.testing.assert_close(at_once.hidden, by_round.hidden, atol=TOLERANCE, rtol=TOLERANCE)


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("window", [None, 5])
def test_a_chain_has_the_outputs_of_the_first_path_of_a_tree(rows, window):
    model = build_model("llama", num_hidden_layers=4)
    heads = heads_for(model, "eagle3", layers=LAYERS, sliding_window=window)
    context = context_of(model, heads, rows=rows)
    commit(context, EMITTED[0][-rows:], on_device=False)
    context.catch_up()
    chain, found = context.start([1, 1, 1]), []
    for token in (3, 4, 5):
        chain.below(torch.full((rows, 1), token), torch.zeros(rows, 1, dtype=torch.long))
        found.append(chain.logits)
    commit(context, [[] for _ in range(rows)], on_device=False)
    tree = context.start([2, 2, 2])
    for token, logits in zip((3, 4, 5), found, strict=True):
        tree.below(torch.tensor([[token, 9]] * rows), torch.zeros(rows, 2, dtype=torch.long))
        torch.testing.assert_close(logits[:, 0], tree.logits[:, 0], atol=TOLERANCE, rtol=TOLERANCE)


def test_a_prompt_has_to_come_first():
    model = build_model("llama", num_hidden_layers=4)
    heads = heads_for(model, "eagle3", layers=LAYERS)
    with pytest.raises(AssertionError, match="propose before begin"):
        EagleContext(heads, TargetView(model)).catch_up()
