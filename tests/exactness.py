"""The promise in one call: the tokens of regular generation, and fewer forwards where drafts
hit."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from speclm import SpecModel
from speclm.drafting.interface import Proposer
from speclm.testing import ScriptedProposer
from tests.models import randomise
from tests.outcomes import observe, require_same

GREEDY = {"do_sample": False}
SAMPLED = {"do_sample": True, "top_k": 0, "temperature": 0.8}
MODES = {"greedy": GREEDY, "sampled": SAMPLED}
WRONG_AT = (2, 5, 6)  # below an even one the draft goes on, at an odd one it ends


def planted(reference: list[list[int]]) -> Proposer:
    """Return a proposer that is right but for planted errors."""
    return ScriptedProposer(reference, WRONG_AT, depth=4)


def require_exact(
    spec: SpecModel,
    inputs: dict[str, Tensor],
    *,
    proposer: Callable[[list[list[int]]], Proposer] = planted,
    plainly: str | None = None,
    is_faster: bool = True,
    **settings: Any,
) -> None:
    """Assert that a call speculates and leaves behind what regular generation does.

    Args:
        spec: The model, whose proposer is replaced.
        inputs: Its prompts.
        proposer: Builds one from the new tokens of regular generation.
        plainly: Words of the reason for which the call decodes plainly instead; None where it
            must not.
        is_faster: Whether it has to take fewer forwards; never fewer than the prompt's own.
        **settings: Arguments of `generate`.
    """
    expected = observe(spec.base, inputs, settings, base=spec.base)
    spec.proposer = proposer(expected.new_tokens(inputs))
    found = observe(spec, inputs, settings, base=spec.base)
    require_same(found, expected)
    reasons = " ".join(spec.last_speculation.fallbacks)
    if plainly is None:
        assert not reasons
        bound = max(expected.num_forwards - is_faster, 1)
        assert found.num_forwards <= bound
    else:
        assert plainly in reasons


def tiny(model_type: type[Any], config_type: type[Any], **settings: Any) -> PreTrainedModel:
    """Return a random model of any family, of two layers unless told otherwise."""
    torch.manual_seed(0)  # for what is not redrawn
    shape = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    return randomise(model_type(config_type(**{**shape, **settings})))
