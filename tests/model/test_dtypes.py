"""Tokens do not depend on the dtype or device that tensors have where nobody says."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel

from speclm import SpecModel
from speclm.methods.eagle.proposer import EagleProposer
from speclm.methods.medusa.proposer import MedusaProposer
from speclm.model.fitting import proposer_modules
from tests.models import build_model, prompts, shared_model
from tests.outcomes import observe, require_same
from tests.proposers import build_proposer, random_eagle, random_heads

SAMPLED = {"do_sample": True, "top_k": 0, "max_new_tokens": 16}


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class Rounds(LogitsProcessor):
    """Returns scores in another dtype at every step."""

    def __init__(self, *dtypes: torch.dtype) -> None:
        self._dtypes = dtypes

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores.to(self._dtypes[input_ids.shape[1] % len(self._dtypes)])


class Narrows(LogitsProcessor):
    """Leaves out the second half of the vocabulary."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores[:, : scores.shape[1] // 2]


def require_same_call(
    kind: str,
    *,
    during: AbstractContextManager[object] | None = None,
    seed: int = 5,
    **settings: object,
) -> None:
    """Assert that a call inside a context gives what the base gives outside of it."""
    base, inputs = shared_model("llama"), prompts(6, 9)
    arguments = {**SAMPLED, **settings}
    expected = observe(base, inputs, arguments, base=base, seed=seed)
    reference = expected.new_tokens(inputs)
    proposer = build_proposer(kind, reference, target=base, draft=shared_model("llama", 7))
    spec = SpecModel(base, proposer)
    with during or nullcontext():
        found = observe(spec, inputs, arguments, base=base, seed=seed)
    require_same(found, expected)
    assert spec.last_speculation.fallbacks == []


def test_default_dtype_does_not_reach_the_noise():
    require_same_call("ngram", during=default_dtype(torch.bfloat16), seed=8)


@pytest.mark.parametrize(
    ("dtypes", "seed"), [([torch.bfloat16], 8), ([torch.float64, torch.float32, torch.float16], 4)]
)
def test_scores_of_another_dtype_are_sampled_from_in_that_dtype(dtypes, seed):
    processors = LogitsProcessorList([Rounds(*dtypes)])
    require_same_call("scripted", seed=seed, logits_processor=processors)


def test_candidates_are_ranked_by_noise_of_any_dtype():
    processors = LogitsProcessorList([Rounds(torch.float16, torch.float64)])
    require_same_call("twin draft", logits_processor=processors)


def test_scores_of_another_width_are_sampled_from_in_that_width():
    require_same_call("scripted", logits_processor=LogitsProcessorList([Narrows()]))


def spec_with_heads(kind: str, base: PreTrainedModel) -> SpecModel:
    if kind == "medusa":
        return SpecModel(base, MedusaProposer(random_heads(base), target=base, min_probability=0.0))
    return SpecModel(base, EagleProposer(random_eagle(base), target=base, min_probability=0.0))


def convert_heads(spec: SpecModel) -> None:
    spec.proposer.heads.to(torch.bfloat16)


def convert_base(spec: SpecModel) -> None:
    spec.base.to(torch.bfloat16)


def convert_what_it_is_part_of(spec: SpecModel) -> None:
    outer = torch.nn.Module()
    outer.inner = spec
    outer.to(torch.bfloat16)
    assert {p.dtype for p in spec.proposer.heads.parameters()} == {spec.base.dtype}


@pytest.mark.parametrize(
    ("kind", "convert", "acceptance"),
    [
        ("medusa", convert_heads, "exact"),
        ("eagle", convert_heads, "exact"),
        ("medusa", convert_base, "rejection"),
        ("eagle", convert_base, "rejection"),
        ("eagle", convert_what_it_is_part_of, "exact"),
    ],
)
def test_heads_and_base_are_converted_by_themselves_or_together(kind, convert, acceptance):
    spec = spec_with_heads(kind, build_model("llama"))
    convert(spec)
    inputs, arguments = prompts(6, 9), {**SAMPLED, "max_new_tokens": 8}
    found = observe(spec, inputs, {**arguments, "acceptance": acceptance}, base=spec.base)
    if acceptance == "exact" and convert is convert_heads:  # halves round otherwise in trees
        require_same(found, observe(spec.base, inputs, arguments, base=spec.base))
    assert spec.last_speculation.fallbacks == []
    assert all(row.num_draft_tokens > 0 for row in spec.last_speculation.rows)


def save(kind: str, base: PreTrainedModel, folder: Path) -> None:
    if kind == "draft":
        build_model("llama", seed=7, num_hidden_layers=1).save_pretrained(folder)
    else:
        spec_with_heads(kind, base).save_pretrained(folder)


@pytest.mark.parametrize("kind", ["draft", "medusa", "eagle"])
def test_what_drafts_may_be_loaded_in_another_dtype_than_the_base(kind, tmp_path):
    base, inputs = shared_model("llama"), prompts(6, 9)
    save(kind, base, tmp_path)
    options = {"dtype": "bfloat16", "min_probability": 0.0}
    spec = SpecModel.from_pretrained(base, tmp_path, heads_kwargs=options)
    modules = (module for module in proposer_modules(spec.proposer) if module is not base)
    assert {p.dtype for module in modules for p in module.parameters()} == {torch.bfloat16}
    for do_sample in (False, True):
        arguments = {"do_sample": do_sample, "max_new_tokens": 8}
        expected = observe(base, inputs, arguments, base=base)
        require_same(observe(spec, inputs, arguments, base=base), expected)
        assert all(row.num_draft_tokens > 0 for row in spec.last_speculation.rows)
