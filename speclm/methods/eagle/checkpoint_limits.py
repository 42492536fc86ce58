"""What other software can hold of EAGLE heads, and heads made to fit it."""

from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from speclm.drafting.base_parts import BaseParts
from speclm.errors import CheckpointError
from speclm.methods.eagle.checkpoint import EagleCheckpoint
from speclm.methods.eagle.checkpoint_config import without_usual_layers
from speclm.methods.eagle.config import NUM_FEATURES, EagleConfig


def unusual_parts(config: EagleConfig) -> dict[str, str]:
    """Return what these heads have and some software cannot hold: a short name and words for it."""
    biases = config.attention_bias, config.attention_output_bias
    width = f"hidden states of the base {config.target_hidden_size} wide, not {config.hidden_size}"
    found = {
        "fc_bias": ("a bias after the joined inputs", config.fc_bias),
        "attention_bias": ("biases in all of attention", all(biases)),
        "qkv_bias": ("biases of queries, keys and values only", biases == (True, False)),
        "output_bias": ("a bias of the attention output only", biases == (False, True)),
        "norm_before_residual": ("a residual after the norm", config.norm_before_residual),
        "fc_norm": ("a norm for each hidden state", config.fc_norm),
        "norm_before_fc": ("one norm for all hidden states", config.norm_before_fc),
        "norm_output": ("a normed state that is fed back", config.norm_output),
        "layers": (f"{config.num_layers} decoder layers", config.num_layers > 1),
        "qk_norm": ("norms of queries and keys", config.has_qk_norm),
        "window": ("a sliding window", config.sliding_window is not None),
        "logit_scale": (f"logits scaled by {config.logit_scale:g}", config.logit_scale != 1),
        "embeddings": ("embeddings of their own", config.has_own_embeddings),
        "lm_head": ("an output matrix of their own", config.has_own_lm_head),
        "draft_vocab": ("a part of the vocabulary", config.has_draft_vocab),
        "num_features": (
            f"{config.num_features} hidden states of the base, not {NUM_FEATURES}",
            config.kind == "eagle3" and config.num_features != NUM_FEATURES,
        ),
        "width": (width, config.target_hidden_size != config.hidden_size),
        "feature_layers": (
            f"hidden states {list(config.feature_layers or ())} of the base",
            config.feature_layers is not None,
        ),
    }
    return {name: words for name, (words, is_there) in found.items() if is_there}


@dataclass(frozen=True, slots=True)
class Limits:
    """What a layout can hold of heads of one kind.

    Args:
        parts: Names of `unusual_parts` that it can hold.
        needs: Names of parts that it cannot do without; matrices are taken from the base.
        ids_from: Index that the software gives to the embeddings among the hidden states: 0 as
            Hugging Face does, -1 if it counts the layers.
    """

    parts: frozenset[str]
    needs: frozenset[str] = frozenset()
    ids_from: int = 0

    @classmethod
    def of(cls, parts: str, *, needs: str = "", ids_from: int = 0) -> "Limits":
        """Return limits from names separated by spaces."""
        return cls(frozenset(parts.split()), frozenset(needs.split()), ids_from)

    def hold(self, config: EagleConfig) -> bool:
        """Return whether heads with a config fit, once parts that are needed have been added."""
        found = unusual_parts(config).keys()
        return self.parts >= found and not (self.needs - _MATRICES.keys() - found)


_ANY = "fc_bias attention_bias qkv_bias output_bias layers qk_norm window logit_scale embeddings"
_NORMS = "norm_before_residual fc_norm norm_before_fc norm_output"
_LISTED = "lm_head draft_vocab feature_layers num_features"

LIMITS: dict[str, dict[str, Limits]] = {
    "speclm": {
        "eagle": Limits.of(f"{_ANY} lm_head draft_vocab"),
        "eagle3": Limits.of(f"{_ANY} {_NORMS} {_LISTED} width"),
    },
    "eagle": {
        "eagle": Limits.of("fc_bias qkv_bias layers embeddings"),
        "eagle3": Limits.of("lm_head draft_vocab embeddings", needs="lm_head"),
    },
    "vllm": {
        "eagle": Limits.of("attention_bias qkv_bias output_bias layers logit_scale embeddings"),
        "eagle3": Limits.of(
            f"attention_bias layers qk_norm logit_scale embeddings width {_NORMS} {_LISTED}"
        ),
    },
    "vllm-legacy": {
        "eagle": Limits.of("fc_bias embeddings lm_head", needs="embeddings lm_head"),
    },
    "sglang": {
        "eagle": Limits.of("fc_bias attention_bias layers draft_vocab"),
        "eagle3": Limits.of(f"fc_norm norm_before_fc norm_output {_LISTED}", ids_from=-1),
    },
    "specforge": {
        "eagle3": Limits.of(
            "fc_norm norm_output lm_head draft_vocab feature_layers", needs="lm_head", ids_from=-1
        ),
    },
    "speculators": {
        "eagle3": Limits.of(
            f"attention_bias layers qk_norm embeddings width {_NORMS} {_LISTED}", needs="lm_head"
        ),
    },
    "modelopt": {"eagle3": Limits.of(f"attention_bias {_LISTED}", ids_from=-1)},
    "rtp-llm": {
        "eagle3": Limits.of("qk_norm embeddings lm_head", needs="qk_norm embeddings lm_head")
    },
}
"""What the software of each format can hold, by kind of heads.

Source: the code of vLLM 0.33, SGLang 0.5.23, SpecForge 0.2.0, speculators 0.9.0, ModelOpt 0.47 and
RTP-LLM of August 2026. Whoever adds a part to the heads adds it here.
"""


@dataclass(frozen=True, slots=True, eq=False)
class Fitted:
    """Heads that a layout can hold.

    Args:
        checkpoint: The heads, without a tree.
        notes: What was left out or added.
    """

    checkpoint: EagleCheckpoint
    notes: tuple[str, ...] = field(default=())


# Key and field of the matrices that heads may share with the base.
_MATRICES = {
    "embeddings": ("embed_tokens.weight", "has_own_embeddings"),
    "lm_head": ("lm_head.weight", "has_own_lm_head"),
}


def fit(
    checkpoint: EagleCheckpoint,
    base: BaseParts | None,
    name: str,
) -> Fitted:
    """Return heads as a format holds them, or refuse them.

    Copies of the base's matrices, zero biases and the usual indices of hidden states are left out;
    matrices that the format needs are added from the base.

    Args:
        checkpoint: The heads.
        base: Their base, if it is known.
        name: The format.

    Raises:
        CheckpointError: If the format cannot hold them, or needs the base.
    """
    if base is not None:
        checkpoint = without_copies(checkpoint, base)
    config = without_usual_layers(checkpoint.config, base.num_layers if base else None)
    tensors, notes = dict(checkpoint.tensors), []
    mine = LIMITS[name].get(config.kind)
    if config.fc_bias and mine and "fc_bias" not in mine.parts and not tensors["fc.bias"].any():
        del tensors["fc.bias"]
        config = replace(config, fc_bias=False)
        notes.append("The bias after the joined inputs was zero and is left out.")
    if mine is None or not mine.hold(config):
        raise _refusal(config, name, has_base=base is not None)
    for part in sorted(mine.needs & _MATRICES.keys()):
        key, switch = _MATRICES[part]
        if getattr(config, switch):
            continue
        tensors[key] = matrix = _from_base(checkpoint, base, name, part)
        added: Any = {switch: True}
        config = replace(config, **added)
        size = matrix.numel() * matrix.element_size()
        notes.append(f"The base's {key} was added, {size:,} bytes.")
    own = EagleCheckpoint(config, tensors, checkpoint.base_name_or_path)
    return Fitted(own, tuple(notes))


def without_copies(checkpoint: EagleCheckpoint, base: BaseParts) -> EagleCheckpoint:
    """Return heads without copies of their base's matrices.

    An output matrix is no copy if the base adds a bias after its own.
    """
    config, matrix = checkpoint.config, None
    may_share = config.kind == "eagle" or not config.has_draft_vocab
    if config.has_own_lm_head and may_share and not base.has_output_bias():
        matrix = base.output_matrix()
        if config.has_draft_vocab:
            columns = checkpoint.tensors["draft_columns"]
            matrix = matrix[columns] if len(matrix) == config.vocab_size else None
    return checkpoint.share(
        embeddings=base.embeddings() if config.has_own_embeddings else None, lm_weight=matrix
    )


def _refusal(config: EagleConfig, name: str, *, has_base: bool) -> CheckpointError:
    mine, parts = LIMITS[name].get(config.kind), unusual_parts(config)
    kind = "EAGLE-3" if config.kind == "eagle3" else "EAGLE-1"
    others = [
        other
        for other, kinds in LIMITS.items()
        if other != name and config.kind in kinds and kinds[config.kind].hold(config)
    ]
    remedy = f"choose one of {others!r}, or train heads without that"
    if mine is None:
        known = "EAGLE-1" if config.kind == "eagle3" else "EAGLE-3"
        return CheckpointError(
            f"format {name!r} holds heads of {known} only, found heads of {kind}; "
            f"choose one of {others!r}"
        )
    missing = sorted(mine.needs - _MATRICES.keys() - parts.keys())
    if missing:
        return CheckpointError(
            f"format {name!r} is for heads with {', '.join(missing)}, found heads of {kind} "
            f"without; choose one of {others!r}"
        )
    refused = {part: words for part, words in parts.items() if part not in mine.parts}
    if not has_base and refused.keys() & {*_MATRICES, "feature_layers"}:
        remedy += "; with the base, what it has too or what is usual for it is left out"
    return CheckpointError(
        f"format {name!r} cannot hold heads of {kind} with {', '.join(refused.values())}, its "
        f"software would misread or ignore that; {remedy}"
    )


def _from_base(checkpoint: EagleCheckpoint, base: BaseParts | None, name: str, part: str) -> Tensor:
    key, config = _MATRICES[part][0], checkpoint.config
    if base is None:
        raise CheckpointError(
            f"format {name!r} needs {key!r}, which these heads share with their base "
            f"{checkpoint.base_name_or_path or '(not recorded)'!r}; pass the base"
        )
    if part == "lm_head" and base.has_output_bias():
        raise CheckpointError(
            f"the output matrix of the base {base.name!r} has a bias, for which the format "
            f"{name!r} has no room, expected none; choose the format 'speclm'"
        )
    matrix = base.embeddings() if part == "embeddings" else base.output_matrix()
    if tuple(matrix.shape) != (config.vocab_size, config.hidden_size):
        raise CheckpointError(
            f"base {base.name!r} has {key!r} of shape {list(matrix.shape)}, expected "
            f"{[config.vocab_size, config.hidden_size]} as the heads; pass the base they were "
            "trained on"
        )
    return matrix.to(checkpoint.dtype)
