"""From what a user writes as ``heads`` to a proposer."""

import difflib
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, PreTrainedModel

from speclm.errors import OptionError, UnknownNameError, UnsupportedModelError
from speclm.proposers.draft_model import DraftModelProposer
from speclm.proposers.interface import Proposer
from speclm.proposers.registry import registered_proposers
from speclm.verify import check_trees


def load_proposer(
    heads: str | Path | PreTrainedModel | Proposer | None,
    base: PreTrainedModel,
    *,
    heads_kwargs: dict[str, Any],
    num_draft_tokens: int | None,
) -> Proposer | None:
    """Return the proposer that `heads` stands for.

    Args:
        heads: Registered name, folder, hub id, loaded draft model, proposer, or None.
        base: The target, whose vocabulary, dtype and device a draft model has to share.
        heads_kwargs: Arguments of a draft model's ``from_pretrained``, or of a registered
            proposer's constructor.
        num_draft_tokens: Most tokens drafted a round; None for the proposer's default.

    Raises:
        UnknownNameError: If a string is no registered name, no folder and not on the hub.
        OptionError: If options are given for an object that is already built.
        VocabularyMismatchError: If a draft model has another vocabulary.
        UnsupportedModelError: If a draft model fails the tree self-check.
    """
    options = {} if num_draft_tokens is None else {"num_draft_tokens": num_draft_tokens}
    if heads is None or isinstance(heads, Proposer):
        unused = sorted({**options, **heads_kwargs})
        if unused:
            raise OptionError(
                f"heads is {heads!r} and {unused!r} would have no effect; pass them where the "
                "proposer is built"
            )
        return heads
    if isinstance(heads, PreTrainedModel):
        if heads_kwargs:
            raise OptionError(
                f"heads is a loaded model and heads_kwargs {sorted(heads_kwargs)!r} would have no "
                "effect; pass them where the model is loaded"
            )
        return _wrap_draft_model(heads, base, options)
    if str(heads) in registered_proposers():
        return _create(str(heads), {**heads_kwargs, **options})
    return _wrap_draft_model(_load_draft_model(heads, base, heads_kwargs), base, options)


def _wrap_draft_model(
    draft: PreTrainedModel, base: PreTrainedModel, options: dict[str, int]
) -> Proposer:
    proposer = DraftModelProposer(draft, target=base, **options)
    check = check_trees(proposer.view)
    if not check.passes:
        raise UnsupportedModelError(
            f"draft model {proposer.view.name} cannot draft trees: {check.reason}; choose a draft "
            "model of a family that passes the self-check, such as Llama or Qwen"
        )
    return proposer


def _create(name: str, options: dict[str, Any]) -> Proposer:
    try:
        return registered_proposers()[name](**options)
    except TypeError as error:
        raise OptionError(
            f"proposer {name!r} does not take {sorted(options)!r} ({error}); "
            f"see help(registered_proposers()[{name!r}])"
        ) from error


def _load_draft_model(
    heads: str | Path, base: PreTrainedModel, heads_kwargs: dict[str, Any]
) -> PreTrainedModel:
    names = sorted(registered_proposers())
    near = difflib.get_close_matches(str(heads), names, n=1)
    if near and not Path(heads).exists() and "/" not in str(heads):
        raise UnknownNameError(  # without asking the hub, which takes long to say no
            f"heads {str(heads)!r} is not a registered proposer nor a folder; did you mean "
            f"{near[0]!r}? registered are {names!r}"
        )
    kwargs = {"dtype": base.dtype, "device_map": {"": base.device}, **heads_kwargs}
    try:
        return AutoModelForCausalLM.from_pretrained(heads, **kwargs)
    except (OSError, ValueError) as error:
        raise UnknownNameError(
            f"heads {str(heads)!r} is not a registered proposer, nor a folder or hub id of a "
            f"causal language model; registered are {names!r}, and a folder needs a "
            f"config.json and weights ({error})"
        ) from error
