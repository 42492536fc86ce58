"""How a `SpecModel` stands in for its base: what it unwraps, what it moves, what it passes on."""

import sys
from collections.abc import Iterator
from typing import Any

from torch import nn

from speclm.drafting.interface import Proposer
from speclm.errors import UnsupportedModelError
from speclm.target import TargetView

MOVES = frozenset(
    {
        "_apply",  # called by the module that a SpecModel is put into
        "bfloat16",
        "cpu",
        "cuda",
        "double",
        "eval",
        "float",
        "half",
        "requires_grad_",
        "to",
        "train",
        "xpu",
    }
)
"""Methods of a module that change it and return it; here heads and draft models go along."""


def unwrap(base: Any, wrapper: type | tuple[type, ...]) -> Any:
    """Return the Transformers model inside a wrapper or a PEFT model, and others as they are.

    Adapters that sit in the layers, such as LoRA, stay active in it.

    Args:
        base: What a user gave as base, or as draft model.
        wrapper: `SpecModel`, whose objects are wrapped anew; empty for draft models.

    Raises:
        UnsupportedModelError: If the adapter is a learned prompt, which sits outside the model.
    """
    if issubclass(type(base), wrapper):
        return base.base
    peft = sys.modules.get("peft")  # where it was never imported, nothing can be one of its models
    if peft is None or not isinstance(base, peft.PeftModel):
        return base
    name, config = type(base).__name__, base.active_peft_config
    if config.is_prompt_learning:
        raise UnsupportedModelError(
            f"{name} has the learned prompt {type(config).__name__}, which its inner model does "
            "not see, expected adapters inside the layers, such as LoRA; call its own generate"
        )
    return base.get_base_model()


def proposer_modules(proposer: Proposer | None) -> Iterator[nn.Module]:
    """Yield the networks that a proposer and its parts hold as attributes, some maybe twice."""
    if proposer is None:
        return
    if isinstance(proposer, nn.Module):
        yield proposer
    for value in vars(proposer).values():
        if isinstance(value, TargetView):
            yield value.model
        elif isinstance(value, nn.Module):
            yield value
    for part in proposer.parts:
        yield from proposer_modules(part)


def move(model: Any, name: str, *args: Any, **kwargs: Any) -> Any:
    """Call one of `MOVES` on a model's base, then on what its proposer holds; return the model."""
    modules = (model.base, *proposer_modules(model.proposer))
    for module in {id(module): module for module in modules}.values():
        getattr(module, name)(*args, **kwargs)
    return model
