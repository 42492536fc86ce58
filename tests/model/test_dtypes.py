"""Tokens do not depend on the dtype or device that tensors have where nobody says."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from speclm import SpecModel
from tests.drafting import build_proposer
from tests.models import prompts, shared_model
from tests.outcomes import observe, require_same

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
