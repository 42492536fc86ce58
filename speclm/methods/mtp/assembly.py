"""Build MTP layers from the classes of a loaded target and the tensors in its files."""

import copy
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from speclm.drafting.heads_network import copy_tensors
from speclm.errors import CheckpointError, UnsupportedModelError, reason_of
from speclm.methods.mtp.checkpoint import LAYER, MtpCheckpoint
from speclm.methods.mtp.network import MtpHeads, MtpLayer
from speclm.target import TargetView, stored_matrices

_ATTENDING = ("full_attention", "sliding_attention")
MATRICES = {"head.weight": "lm_weight", "embeddings.weight": "embeddings"}
"""Our names of matrices that may be copies of the target's, and what those are there."""

_EXPERT = re.compile(r"(.+\.experts\.)([0-9]+)(\..+)")
_NUM_COMPARED = 16
"""Rows by which a matrix is known as a copy of the target's; a whole one may have gigabytes."""


def build_mtp(
    checkpoint: MtpCheckpoint,
    view: TargetView,
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> MtpHeads:
    """Return the MTP layers of a target, in evaluation mode.

    Args:
        checkpoint: Its layers on the disk; only their tensors are read.
        view: The target.
        dtype: Dtype of the weights.
        device: Device of the weights.

    Raises:
        CheckpointError: If the tensors do not fit the target.
        UnsupportedModelError: If the target's decoder cannot be built with one layer.
    """
    place = (dtype, device)
    layers = [_layer(checkpoint, step, view, place) for step in range(len(checkpoint.steps))]
    heads = MtpHeads(layers, keys=checkpoint.steps)
    return heads.eval().requires_grad_(requires_grad=False)


def _layer(
    checkpoint: MtpCheckpoint, step: int, view: TargetView, place: tuple[torch.dtype, torch.device]
) -> MtpLayer:
    keys = checkpoint.steps[step]
    of_layer = [name for name in keys if name.startswith(LAYER)]
    of_decoder = checkpoint.load(step, of_layer)
    _require_equal_experts(checkpoint, step, of_decoder)
    inner = {f"layers.0.{name.removeprefix(LAYER)}": tensor for name, tensor in of_decoder.items()}
    others = checkpoint.load(step, [name for name in keys if name not in of_layer])
    own = _without_copies(others, stored_matrices(view.model))
    _require_sizes(checkpoint, step, own, view)
    inner["norm.weight"] = own.pop("norm.weight")
    dtype, device = place
    decoder = _decoder(checkpoint, step, inner, cast("PreTrainedModel", view.decoder), dtype)
    cast("Any", decoder).to(device=device)
    tensors = copy_tensors(own, dtype=dtype, device=device)
    try:
        layer = MtpLayer(decoder, tensors, is_hidden_first=checkpoint.layout.is_hidden_first)
    except Exception as error:  # of any modeling code
        raise _unusable(checkpoint, decoder, error) from error
    for name, weight in layer.named_parameters():
        if weight.numel() and not all(bound.isfinite() for bound in weight.aminmax()):
            raise CheckpointError(
                f"{checkpoint.source.path}: MTP layer {step} has numbers in {name!r} that are not "
                f"finite as {dtype}, expected weights; download the files again, or pass "
                "heads_kwargs={'dtype': 'float32'} if they overflow"
            )
    return layer


def _require_sizes(
    checkpoint: MtpCheckpoint, step: int, tensors: Mapping[str, Tensor], view: TargetView
) -> None:
    """Check the shapes of all tensors but those of the decoder layer."""
    width = view.hidden_size
    shapes: dict[str, tuple[int, ...]] = {"projection.weight": (width, 2 * width)}
    shapes |= dict.fromkeys(MATRICES, (view.vocab_size, width))
    for name, tensor in tensors.items():
        found, wanted = tuple(tensor.shape), shapes.get(name, (width,))
        if found != wanted:
            raise _misfit(checkpoint, checkpoint.steps[step][name], found, wanted)


def _require_equal_experts(
    checkpoint: MtpCheckpoint, step: int, tensors: Mapping[str, Tensor]
) -> None:
    """Check that a layer has each tensor of its experts for all of them, of one shape."""
    experts: dict[tuple[str, str], dict[int, str]] = {}
    for name in tensors:
        found = _EXPERT.fullmatch(name)
        if found is not None:
            experts.setdefault((found[1], found[3]), {})[int(found[2])] = name
    num_experts = max(map(len, experts.values()), default=0)
    keys = checkpoint.steps[step]
    for names in experts.values():
        if names.keys() != set(range(num_experts)):
            wrong = min(set(range(num_experts)) - names.keys())
            example = keys[next(iter(names.values()))]
            raise CheckpointError(
                f"{checkpoint.source.path}: MTP layer {step} has {len(names)} experts with a "
                f"tensor like {example!r}, and none for expert {wrong}, expected one for each of "
                f"{num_experts}; download all files of one revision"
            )
        shapes = {name: tuple(tensors[name].shape) for name in names.values()}
        wanted = Counter(shapes.values()).most_common(1)[0][0]
        for name, shape in shapes.items():
            if shape != wanted:
                raise _misfit(checkpoint, keys[name], shape, wanted)


def _misfit(
    checkpoint: MtpCheckpoint, key: str, found: tuple[int, ...], wanted: tuple[int, ...]
) -> CheckpointError:
    return CheckpointError(
        f"{checkpoint.source.path}: {key!r} has the shape {found}, expected {wanted} for the "
        "loaded base; the files are of another model or revision, name those of the base with "
        "heads_kwargs={'heads_path': ...}"
    )


def _without_copies(
    tensors: dict[str, Tensor], theirs: Mapping[str, Tensor | None]
) -> dict[str, Tensor]:
    """Return tensors without copies of the target's embeddings and output matrix."""
    return {
        name: tensor
        for name, tensor in tensors.items()
        if name not in MATRICES or not _is_copy(tensor, theirs[MATRICES[name]])
    }


def _is_copy(mine: Tensor, theirs: Tensor | None) -> bool:
    """Return whether a matrix has the rows of the target's, whose vocabulary may be resized."""
    if theirs is None or theirs.is_meta or mine.ndim != 2 or mine.shape[1] != theirs.shape[1]:
        return False
    if not len(mine) or not len(theirs):
        return False
    rows = torch.arange(_NUM_COMPARED, device="cpu", dtype=torch.long)
    rows = rows * (min(len(mine), len(theirs)) - 1) // (_NUM_COMPARED - 1)
    compared = theirs[rows.to(theirs.device)]
    return torch.equal(mine[rows].to(theirs.device, theirs.dtype), compared)


def _decoder(
    checkpoint: MtpCheckpoint,
    step: int,
    tensors: dict[str, Tensor],
    like: PreTrainedModel,
    dtype: torch.dtype,
) -> PreTrainedModel:
    """Return a model of the target's class with the one layer, loaded as Transformers loads it."""
    config = _layer_config(like, step, tensors)
    one_row = torch.ones(1, int(config.hidden_size), dtype=dtype, device="cpu")
    kind: Any = type(like)
    try:
        decoder, report = kind.from_pretrained(
            None,
            config=config,
            state_dict={**tensors, "embed_tokens.weight": one_row},
            dtype=dtype,
            attn_implementation=like.config._attn_implementation,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except Exception as error:  # of any modeling code
        raise _unusable(checkpoint, like, error) from error
    for key, found, wanted in sorted(report["mismatched_keys"]):
        raise _misfit(checkpoint, _key_of(checkpoint, step, key), tuple(found), tuple(wanted))
    wrong = {"lacks": report["missing_keys"], "has": report["unexpected_keys"]}
    for verb, keys in wrong.items():
        if keys:
            named = [_key_of(checkpoint, step, key) for key in sorted(keys)[:6]]
            raise CheckpointError(
                f"{checkpoint.source.path}: MTP layer {step} {verb} {named!r}, "
                f"expected the tensors of a {type(like).__name__} layer; the files are of another "
                "model or revision, or speclm does not know this layout"
            )
    return cast("PreTrainedModel", decoder)


def _unusable(
    checkpoint: MtpCheckpoint, decoder: PreTrainedModel, error: Exception
) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{type(decoder).__name__} cannot be built and run with the single MTP layer in "
        f"{checkpoint.source.path} ({reason_of(error)}), expected a decoder of `layers` and a "
        "`norm` that takes embeddings and a cache; use other heads"
    )


def _key_of(checkpoint: MtpCheckpoint, step: int, name: str) -> str:
    ours = LAYER + name.removeprefix("layers.0.")
    return checkpoint.steps[step].get(ours, name)


def _layer_config(
    like: PreTrainedModel, step: int, tensors: Mapping[str, Tensor]
) -> PretrainedConfig:
    """Return the config of a decoder with one layer, of the kind that its tensors are of."""
    config: Any = copy.deepcopy(like.config)
    is_sparse = any(".experts." in name for name in tensors)
    changes: dict[str, Any] = {
        "num_hidden_layers": 1,
        "vocab_size": 1,  # embeddings are given
        "pad_token_id": None,
        "mlp_layer_types": ["sparse" if is_sparse else "dense"],
        "first_k_dense_replace": int(not is_sparse),
        "mlp_only_layers": [] if is_sparse else [0],
        "decoder_sparse_step": 1,
    }
    own_types = getattr(config, "mtp_layer_types", None)
    types = getattr(config, "layer_types", None)
    for name, value in changes.items():
        if name == "pad_token_id" or getattr(config, name, None) is not None:
            setattr(config, name, value)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    if types is not None:
        candidates = own_types[step : step + 1] if own_types else []
        candidates = candidates or [kind for kind in _ATTENDING if kind in types]
        config.layer_types = candidates[:1] or ["full_attention"]
        for kind in candidates:
            config.layer_types = [kind]
            if _fits(type(like), config, tensors):
                break
    return cast("PretrainedConfig", config)


def _fits(kind: Any, config: PretrainedConfig, tensors: Mapping[str, Tensor]) -> bool:
    """Return whether the attention of a layer has the shapes of tensors of the same name."""
    with torch.device("meta"):
        state: dict[str, Tensor] = kind(config).state_dict()
    return all(
        tensor.shape == state[name].shape
        for name, tensor in tensors.items()
        if ".self_attn." in name and name in state
    )
