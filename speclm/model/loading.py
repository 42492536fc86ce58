"""From what a user writes as ``heads`` to a proposer."""

import inspect
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from speclm.drafting.combined import CombinedProposer
from speclm.drafting.interface import Proposer
from speclm.drafting.registry import registered_proposers
from speclm.errors import CheckpointError, OptionError, UnknownNameError, UnsupportedModelError
from speclm.methods.draft_model.chain_proposer import ChainDraftProposer
from speclm.methods.draft_model.proposer import DraftModelProposer
from speclm.methods.eagle.checkpoint import read_eagle
from speclm.methods.eagle.network import build_eagle
from speclm.methods.eagle.proposer import EagleProposer
from speclm.methods.medusa.checkpoint import MedusaCheckpoint, read_medusa
from speclm.methods.medusa.network import MedusaHeads, MedusaHeadsConfig
from speclm.methods.medusa.proposer import MedusaProposer
from speclm.model.causal_lm import load_causal_lm, suggest
from speclm.model.hub import HubOptions, find_heads
from speclm.model.standing_in import unwrap
from speclm.self_check.check import check_model
from speclm.self_check.verdict import Verification
from speclm.target import TargetView, stored_matrices

_DRAFT_OPTIONS = (
    "num_draft_tokens",
    "dtype",
    "device_map",
    "revision",
    "quantization_config",
    "attn_implementation",
)
_MEDUSA_OPTIONS = ("dtype", "min_probability", "tree")


Heads = str | Path | nn.Module | Proposer
"""What a user may write for one proposer; modules are draft models, PEFT's too."""


def load_proposer(
    heads: Heads | list[Heads] | tuple[Heads, ...] | None,
    base: PreTrainedModel,
    *,
    heads_kwargs: dict[str, Any] | None,
    num_draft_tokens: int | None,
) -> Proposer | None:
    """Return the proposer that `heads` stands for.

    Args:
        heads: Registered name, folder, hub id, loaded draft model, proposer, or None; or several
            of them, whose guesses are joined.
        base: The target, whose vocabulary, dtype and device a draft model has to share.
        heads_kwargs: Arguments of a draft model's ``from_pretrained``, or of a registered
            proposer's constructor; ``dtype``, ``min_probability`` and ``tree`` for Medusa heads,
            and ``dtype`` and the fields of `EagleProposerConfig` for EAGLE heads. Those of
            `HubOptions` say which files are taken.
        num_draft_tokens: Most tokens drafted a round; None for the proposer's default.

    Raises:
        UnknownNameError: If a string is no registered name, no folder and not to be had from the
            hub.
        OptionError: If options are given for an object that is already built, or are none.
        VocabularyMismatchError: If a draft model or heads have another vocabulary.
        UnsupportedModelError: If a draft model fails the tree self-check.
        CheckpointError: If heads are damaged or incomplete.
    """
    heads_kwargs = {} if heads_kwargs is None else heads_kwargs
    if not isinstance(heads_kwargs, dict):
        raise OptionError(
            f"heads_kwargs is {heads_kwargs!r}, expected a dictionary of options by name; pass for "
            "example {'min_probability': 0.1}"
        )
    options = {} if num_draft_tokens is None else {"num_draft_tokens": num_draft_tokens}
    if isinstance(heads, list | tuple):
        return _join(heads, base, heads_kwargs, options)
    if heads is None or isinstance(heads, Proposer):
        unused = sorted({**options, **heads_kwargs})
        if unused:
            raise OptionError(
                f"heads is {heads!r} and {unused!r} would have no effect; pass them where the "
                "proposer is built"
            )
        return heads
    heads = unwrap(heads, ())
    if isinstance(heads, PreTrainedModel):
        if heads_kwargs:
            raise OptionError(
                f"heads is a loaded model and heads_kwargs {sorted(heads_kwargs)!r} would have no "
                "effect; pass them where the model is loaded"
            )
        return _wrap_draft_model(heads, base, options)
    if not isinstance(heads, str | Path):
        raise OptionError(
            f"heads is a {type(heads).__name__}, expected a name, folder, hub id, draft model, "
            "Proposer, list of these or None; MedusaHeads go into a MedusaProposer"
        )
    if str(heads) in registered_proposers():
        return _create(str(heads), {**heads_kwargs, **options})
    hub, heads_kwargs = HubOptions.split(heads_kwargs)
    kind, folder = find_heads(heads, hub)
    if kind == "medusa":
        return _load_medusa(folder, heads, base, {**heads_kwargs, **options})
    if kind == "eagle":
        return _load_eagle(folder, base, {**heads_kwargs, **options})
    heads_kwargs = {**heads_kwargs, **hub.given}
    return _wrap_draft_model(_load_draft_model(heads, base, heads_kwargs), base, options)


def _join(
    heads: list[Heads] | tuple[Heads, ...],
    base: PreTrainedModel,
    heads_kwargs: dict[str, Any],
    options: dict[str, int],
) -> Proposer:
    if heads_kwargs:
        raise OptionError(
            f"heads are {len(heads)} proposers and heads_kwargs {sorted(heads_kwargs)!r} would "
            "have no clear owner; pass proposers that are built with their options"
        )
    parts = [load_proposer(part, base, heads_kwargs=None, num_draft_tokens=None) for part in heads]
    return CombinedProposer([part for part in parts if part is not None], **options)


def _load_medusa(
    folder: Path, heads: str | Path, base: PreTrainedModel, options: dict[str, Any]
) -> Proposer:
    dtype = options.pop("dtype", base.dtype)
    unknown = sorted(options.keys() - {"min_probability", "tree", "num_draft_tokens"})
    if unknown:
        raise OptionError(
            f"Medusa heads do not take {unknown!r} in heads_kwargs; known are {_MEDUSA_OPTIONS!r}; "
            f"{suggest(unknown[0], (*_MEDUSA_OPTIONS, 'num_draft_tokens'))}"
        )
    checkpoint = read_medusa(folder)
    if checkpoint.is_merged and base.config.name_or_path not in {str(heads), str(folder)}:
        raise OptionError(
            f"{heads} holds a model merged with its heads, which were trained together; the base "
            f"is {base.config.name_or_path!r}, load the base from {str(heads)!r} too"
        )
    dtype = _dtype(dtype)
    options.setdefault("tree", checkpoint.choices)
    return MedusaProposer(_build_heads(checkpoint, TargetView(base), dtype), target=base, **options)


def _load_eagle(folder: Path, base: PreTrainedModel, options: dict[str, Any]) -> Proposer:
    dtype = _dtype(options.pop("dtype", base.dtype))
    view = TargetView(base)
    checkpoint = read_eagle(folder).share(**stored_matrices(base))
    heads = build_eagle(checkpoint, dtype=dtype, device=view.device)
    heads = heads.eval().requires_grad_(requires_grad=False)
    options.setdefault("tree", checkpoint.choices)
    return EagleProposer(heads, target=base, **options)


def _dtype(dtype: object) -> torch.dtype:
    found = getattr(torch, dtype, dtype) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise OptionError(f"dtype of the heads is {found!r}, expected one such as torch.bfloat16")
    return found


def _build_heads(checkpoint: MedusaCheckpoint, view: TargetView, dtype: torch.dtype) -> MedusaHeads:
    config = MedusaHeadsConfig(
        hidden_size=checkpoint.hidden_size,
        vocab_size=checkpoint.vocab_size or view.vocab_size,
        num_heads=checkpoint.num_heads,
        num_layers=checkpoint.num_layers,
        has_own_lm_head=checkpoint.has_own_lm_head,
        has_bias=checkpoint.has_bias,
    )
    module = MedusaHeads(config, device=torch.device("meta"))
    state = {n: t.to(view.device, dtype) for n, t in checkpoint.tensors.items()}
    module.load_state_dict(state, assign=True)
    return module.eval().requires_grad_(requires_grad=False)


def _wrap_draft_model(
    draft: PreTrainedModel, base: PreTrainedModel, options: dict[str, int]
) -> Proposer:
    view = TargetView(draft)
    check = check_model(view)
    if check.verification is Verification.TREES:
        return DraftModelProposer(draft, target=base, **options)
    if check.verification is Verification.CHAINS:
        return ChainDraftProposer(draft, target=base, **options)
    raise UnsupportedModelError(
        f"draft model {view.name} can draft neither trees nor chains: {check.reason}; choose one "
        "of a family that passes the self-check, such as Llama or Qwen"
    )


def _create(name: str, options: dict[str, Any]) -> Proposer:
    try:
        return registered_proposers()[name](**options)
    except TypeError as error:
        kind = registered_proposers()[name]
        known = inspect.signature(kind).parameters
        unknown = [option for option in options if option not in known]
        remedy = f"{suggest(unknown[0], known)} " if unknown else ""
        raise OptionError(
            f"proposer {name!r} does not take {sorted(options)!r} ({error}); {remedy}"
            f"see help(registered_proposers()[{name!r}])"
        ) from error


def _load_draft_model(
    heads: str | Path, base: PreTrainedModel, heads_kwargs: dict[str, Any]
) -> PreTrainedModel:
    names = sorted(registered_proposers())
    kwargs = {"dtype": base.dtype, "device_map": {"": TargetView(base).device}, **heads_kwargs}
    try:
        return load_causal_lm(heads, kwargs, owner="draft model", known=_DRAFT_OPTIONS)
    except (OptionError, CheckpointError):
        raise
    except (OSError, ValueError) as error:
        raise UnknownNameError(
            f"heads {str(heads)!r} is not a registered proposer, nor a folder or hub id of a "
            f"causal language model or of Medusa heads; registered are {names!r}, and a folder "
            f"needs a config.json and weights ({error})"
        ) from error
