"""Load assistants of Gemma 4, and check that they were made for a target."""

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import AutoConfig, Gemma4TextConfig, PretrainedConfig, PreTrainedModel

from speclm.config import MAX_NODES
from speclm.errors import (
    CheckpointError,
    OptionError,
    UnsupportedModelError,
    VocabularyMismatchError,
    reason_of,
    shown,
)
from speclm.files.weights import WeightFiles, weight_files
from speclm.forking import reset_in_children
from speclm.methods.gemma_assistant.method import TYPES
from speclm.methods.gemma_assistant.network import FULL, SLIDING
from speclm.target import TargetView
from speclm.target.loading import load_causal_lm, require_sound

_TARGET_TYPES = frozenset({"gemma4_text", "gemma4_unified_text"})
_OPTIONS = ("dtype", "device_map", "quantization_config", "attn_implementation")
_SIZES = ("num_key_value_heads", "head_dim")
_DEFAULT_TOKENS = 8  # if the generation config names no number


def load_assistant(
    folder: Path, target: TargetView, options: Mapping[str, Any], *, known: tuple[str, ...]
) -> PreTrainedModel:
    """Load an assistant with Transformers, after a look at its config and its tables.

    Args:
        folder: Where its files are.
        target: The model that it drafts for.
        options: Arguments of ``from_pretrained``, by default the target's dtype and device.
        known: Other options, for messages.

    Raises:
        UnsupportedModelError: If the target is no Gemma 4.
        VocabularyMismatchError: If the assistant was made for another vocabulary.
        OptionError: If it was made for another target, or takes no such option.
        CheckpointError: If a file is damaged or of another size than the config says.
    """
    path = folder / "config.json"
    require_sound(folder)
    try:
        config = AutoConfig.from_pretrained(folder)
        _layers_of(config)
    except Exception as error:  # damaged ones raise nearly everything
        raise CheckpointError(
            f"{path}: no config of a Gemma 4 assistant can be made of it ({reason_of(error)}), "
            "expected an undamaged one; download it again"
        ) from error
    _require_target(config, target)
    source = next(iter(weight_files(folder)), None)
    if source is None:
        raise CheckpointError(
            f"{folder}: found the config of a Gemma 4 assistant and no weights, expected "
            "safetensors next to it; download them"
        )
    _require_sizes(source, config)
    loading = {"dtype": target.model.dtype, "device_map": {"": target.device}, **options}
    try:
        with shared_everywhere():
            return load_causal_lm(folder, loading, owner="assistant", known=(*_OPTIONS, *known))
    except (OptionError, CheckpointError):
        raise
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{folder}: the assistant cannot be loaded ({reason_of(error)}), expected an undamaged "
            "config and weights, and options that fit them; download them again"
        ) from error


def require_match(model: PreTrainedModel, target: TargetView) -> dict[str, int]:
    """Check that a loaded assistant was made for a target.

    Returns:
        The target's layer that the assistant's layers of each type read.

    Raises:
        UnsupportedModelError: If it is no assistant, or the target no Gemma 4.
        VocabularyMismatchError: If it was made for another vocabulary.
        OptionError: If it was made for another target.
        CheckpointError: If its clusters do not hold each token once.
    """
    if model.config.model_type not in TYPES:
        raise UnsupportedModelError(
            f"assistant is a {type(model).__name__}, expected a Gemma4AssistantForCausalLM; load "
            "one with AutoModelForCausalLM.from_pretrained"
        )
    layers = _require_target(model.config, target)
    head = cast("Any", model).masked_embedding
    if head is not None:
        _require_ordering(head.token_ordering, owner=model.config.name_or_path or "assistant")
    return layers


def num_assistant_tokens(model: PreTrainedModel) -> int:
    """Return how many tokens an assistant drafts by its own generation config.

    Raises:
        CheckpointError: If that is no number of tokens.
    """
    found: object = getattr(model.generation_config, "num_assistant_tokens", None)
    if found is None:
        return _DEFAULT_TOKENS
    if isinstance(found, bool) or not isinstance(found, int) or not 1 <= found < MAX_NODES:
        raise CheckpointError(
            f"num_assistant_tokens in the generation config of the assistant is {shown(found)}, "
            f"expected 1 to {MAX_NODES - 1}; correct it, or pass num_draft_tokens"
        )
    return found


def _require_target(config: PretrainedConfig, target: TargetView) -> dict[str, int]:
    """Check an assistant's config against a target; return what its layers read; see above."""
    own, base = config.get_text_config(), target.model.config.get_text_config()
    if base.model_type not in _TARGET_TYPES:
        raise UnsupportedModelError(
            f"base {target.name} is of type {base.model_type!r}, expected a Gemma 4, because the "
            "assistant reads the keys and values of one; take the base that it was made for"
        )
    if own.vocab_size != target.vocab_size:
        raise VocabularyMismatchError(
            f"assistant has a vocabulary of {own.vocab_size}, the base {target.name} one of "
            f"{target.vocab_size}; take the assistant that was made for it"
        )
    width: Any = cast("Any", config).backbone_hidden_size
    if width != target.hidden_size:
        raise _other_target(f"backbone_hidden_size {width}", target, target.hidden_size)
    layers = _layers_with_states(base)
    theirs = _layers_of(base)
    for kind, *sizes in _layers_of(config):
        if kind not in layers:
            raise _other_target(f"layers of {kind!r}", target, f"keys of {sorted(layers)!r} only")
        _, *read = theirs[layers[kind]]
        for name, wanted, found in zip(_SIZES, sizes, read, strict=True):
            if wanted != found:
                raise _other_target(f"{name} {wanted} in a layer of {kind!r}", target, found)
        if own.num_attention_heads % sizes[0]:
            raise CheckpointError(
                f"assistant has {own.num_attention_heads} attention heads for {sizes[0]} of keys, "
                "expected a multiple; download it again"
            )
    return layers


def _layers_of(config: PretrainedConfig) -> list[tuple[str, int, int]]:
    """Return the type of each layer, and its `_SIZES`."""
    text: Any = config.get_text_config()
    parts = [text.per_layer_config[index] for index in range(text.num_hidden_layers)]
    return [
        (kind, part.num_key_value_heads, part.head_dim)
        for kind, part in zip(text.layer_types, parts, strict=True)
    ]


def _layers_with_states(config: PretrainedConfig) -> dict[str, int]:
    """Return the last layer of each type that has keys and values of its own."""
    own: Any = config
    count = own.num_hidden_layers - (own.num_kv_shared_layers or 0)
    kinds = enumerate(own.layer_types[:count])
    return {kind: index for index, kind in kinds if kind in {FULL, SLIDING}}


def _other_target(wanted: str, target: TargetView, found: object) -> OptionError:
    return OptionError(
        f"assistant was made for another base: it has {wanted}, the base {target.name} {found}; "
        "take the assistant that was made for it"
    )


def _require_sizes(source: WeightFiles, config: PretrainedConfig) -> None:
    """Check the tensors that depend on the target before Transformers builds anything."""
    given: Any = config
    text = given.get_text_config()
    hidden, width = text.hidden_size, given.backbone_hidden_size
    sizes: dict[str, tuple[int, ...]] = {
        "pre_projection.weight": (hidden, 2 * width),
        "post_projection.weight": (width, hidden),
    }
    if given.use_ordered_embeddings:
        clusters, top = given.num_centroids, given.centroid_intermediate_top_k
        if not 1 <= top <= clusters or text.vocab_size % clusters:
            raise CheckpointError(
                f"{source.path}: num_centroids is {clusters} and centroid_intermediate_top_k "
                f"{top}, expected a divisor of the vocabulary of {text.vocab_size} and at most as "
                "many; download the config again"
            )
        sizes["masked_embedding.centroids.weight"] = (clusters, hidden)
        sizes["masked_embedding.token_ordering"] = (text.vocab_size,)
    missing = sorted(sizes.keys() - source.files.keys())
    if missing:
        raise CheckpointError(
            f"{source.path}: {missing[0]!r} is missing, expected the weights of a Gemma 4 "
            "assistant; download them again"
        )
    tensors = source.load(sorted(sizes))
    for key, size in sizes.items():
        if tuple(tensors[key].shape) != size:
            raise CheckpointError(
                f"{source.path}: {key!r} has the shape {tuple(tensors[key].shape)}, expected "
                f"{size} by the config; weights and config are of different assistants, download "
                "both again"
            )
    if given.use_ordered_embeddings:
        _require_ordering(tensors["masked_embedding.token_ordering"], owner=str(source.path))


def _require_ordering(ordering: Tensor, *, owner: str) -> None:
    """Check that an order of tokens holds each once; syncs with its device."""
    is_whole = not ordering.is_floating_point() and torch.equal(
        ordering.long().sort().values, torch.arange(len(ordering), device=ordering.device)
    )
    if not is_whole:
        raise CheckpointError(
            f"{owner}: token_ordering does not hold each of {len(ordering)} tokens once, expected "
            "the tokens in the order of their clusters; download the assistant again"
        )


_REPAIRING = [threading.RLock()]


def _renew_lock() -> None:
    _REPAIRING[0] = threading.RLock()  # a thread that no longer exists may hold the old one


reset_in_children(_renew_lock)


@contextmanager
def shared_everywhere() -> Iterator[None]:
    """Let Transformers build models whose layers all read the keys and values of another model.

    Version 5.23.0 looks in every config for a layer that stores what the others read, and so builds
    no assistant at all. Inside the block, configs in which no layer stores any say so.
    """
    own = vars(Gemma4TextConfig).get("kv_sharing_modes")
    if not isinstance(own, property) or _builds_assistants():
        yield
        return
    from transformers.models.gemma4_unified.configuration_gemma4_unified import (
        Gemma4UnifiedTextConfig,
    )

    kinds: list[Any] = [Gemma4TextConfig, Gemma4UnifiedTextConfig]
    with _REPAIRING[0]:
        before = {kind: vars(kind)["kv_sharing_modes"] for kind in kinds}
        try:
            for kind, modes in before.items():
                kind.kv_sharing_modes = _with_all_shared(modes)
            yield
        finally:
            for kind, modes in before.items():
                kind.kv_sharing_modes = modes


def _builds_assistants() -> bool:
    size: dict[str, Any] = {"num_hidden_layers": 1, "num_kv_shared_layers": 1}
    config: Any = Gemma4TextConfig(layer_types=[FULL], **size)
    try:
        return bool(config.kv_sharing_modes)
    except ValueError:
        return False


def _with_all_shared(modes: Any) -> property:
    def kv_sharing_modes(config: Any) -> list[str | None]:
        if config.num_kv_shared_layers == config.num_hidden_layers:
            return ["reuse"] * config.num_hidden_layers
        return cast("list[str | None]", modes.fget(config))

    return property(kv_sharing_modes)
