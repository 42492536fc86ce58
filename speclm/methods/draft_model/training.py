"""Create draft models for training, new ones or saved ones, and write those that were trained."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from speclm.cards import HeadsCard
from speclm.drafting.heads_folder import (
    CARD_NAME,
    CONFIG_NAME,
    WEIGHTS_NAME,
    Destination,
    require_replaceable,
)
from speclm.drafting.package import require_same_tensors
from speclm.errors import (
    CheckpointError,
    OptionError,
    SpeclmError,
    UnknownNameError,
    reason_of,
)
from speclm.files.atomic import read_json, write_file, written_together
from speclm.files.hub import path_exists
from speclm.target import TargetView, stored_matrices
from speclm.target.loading import load_causal_lm

_log = logging.getLogger("speclm")

_MARK = "speclm"  # key of the config by which a folder that may be replaced is recognised
_KIND = "draft"
_MAX_POSITIONS = 2048  # of a draft model for a base without a bound
_ROPE_THETA = 10_000.0
_SUMMARY = """\
A small language model for speculative decoding, distilled from the base model: it has the same
vocabulary and drafts one token after another; the base model verifies all draft tokens in one
forward.
"""
_SOFTWARE = """\
The folder is that of an ordinary causal language model of Transformers, with the base model's
tokenizer. Libraries that take a draft model, such as vLLM and Transformers itself, load it.
"""


def new_draft_model(
    base: PreTrainedModel,
    *,
    hidden_size: int | None = None,
    num_layers: int = 2,
    num_heads: int | None = None,
    is_tied: bool = True,
    seed: int = 0,
) -> PreTrainedModel:
    """Return an untrained draft model for a base, a small Llama in float32 on its device.

    Its embeddings start as those of the base, projected on their leading principal components if
    they are wider; so does an output matrix of its own.

    Args:
        base: The target; it decides vocabulary, special tokens and the number of positions.
        hidden_size: Width; None for a quarter of the base's.
        num_layers: Decoder layers.
        num_heads: Attention heads; None for one for each 64 of the width, if these divide it.
        is_tied: Whether the embeddings are the output matrix too.
        seed: Seed of the random weights.

    Raises:
        OptionError: If the heads do not divide the width into even parts.
    """
    view, text = TargetView(base), base.config.get_text_config()
    width = hidden_size or max(16, view.hidden_size // 4 // 16 * 16)
    heads = num_heads or (width // 64 if width % 64 == 0 else 1)
    if width % (2 * heads):
        raise OptionError(
            f"--hidden-size is {width} and --num-heads {heads}, expected a width that the heads "
            f"divide into even parts, such as {max(1, round(width / 64)) * 64} and "
            f"{max(1, round(width / 64))}; change one of them"
        )
    rope = getattr(text, "rope_parameters", None)
    theta = rope.get("rope_theta") if isinstance(rope, Mapping) else None
    ends: dict[str, Any] = _special_tokens(base)
    config = LlamaConfig(
        vocab_size=view.vocab_size,
        hidden_size=width,
        intermediate_size=-(-8 * width // 3 // 16) * 16,
        num_hidden_layers=num_layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=view.max_positions or _MAX_POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": theta or _ROPE_THETA},
        tie_word_embeddings=is_tied,
        **ends,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        make: Any = AutoModelForCausalLM.from_config
        draft: PreTrainedModel = make(config, dtype=torch.float32)
    draft.to(view.device)  # type: ignore[arg-type]  # Transformers' decorator
    start_embeddings_(draft, base)
    return draft


def _special_tokens(base: PreTrainedModel) -> dict[str, Any]:
    """Return the ids with which the base begins, ends and pads texts, None where it has none."""
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {name: getattr(base.generation_config, name, None) for name in names}


@torch.no_grad()
def start_embeddings_(draft: PreTrainedModel, base: PreTrainedModel) -> None:
    """Start the matrices of a new draft model that belong to tokens as those of the base.

    What the base has quantised, offloaded or narrower stays random, with a log line.
    """
    theirs = stored_matrices(base)
    mine: dict[str, Any] = {"embeddings": draft.get_input_embeddings()}
    if not draft.config.tie_word_embeddings:
        mine["lm_weight"] = draft.get_output_embeddings()  # type: ignore[no-untyped-call]
    for name, module in mine.items():
        matrix, weight = theirs[name], module.weight
        if matrix is None or matrix.is_meta or matrix.shape[1] < weight.shape[1]:
            _log.info("%s of the draft model start at random; the base's do not fit", name)
            continue
        weight[: len(matrix)] = leading_components(matrix, weight.shape[1])[: len(weight)]


def leading_components(
    matrix: Float[Tensor, "vocab hidden"], width: int
) -> Float[Tensor, "vocab width"]:
    """Return the rows of a matrix in the basis of its leading principal directions, in float32.

    A matrix of the wanted width is returned as it is.
    """
    matrix = matrix.float()
    if matrix.shape[1] == width:
        return matrix
    directions = torch.linalg.eigh(matrix.T @ matrix).eigenvectors  # the last are the leading ones
    rotated: Tensor = matrix @ directions[:, -width:].flip(1)
    return rotated


def load_draft_model(name: str | Path, *, revision: str | None = None) -> PreTrainedModel:
    """Load a causal language model for further training, in float32.

    Args:
        name: Folder or hub id.
        revision: Branch, tag or commit on the hub; None for the main branch.

    Raises:
        UnknownNameError: If it is neither a folder nor a hub id of such a model.
        CheckpointError: If a file is damaged.
    """
    options: dict[str, Any] = {"dtype": torch.float32}
    if revision is not None:
        options["revision"] = revision
    try:
        return load_causal_lm(name, options, owner="draft model")
    except (OptionError, CheckpointError):
        raise
    except (OSError, ValueError) as error:
        raise UnknownNameError(
            f"draft model {str(name)!r} (--init) is not a folder or hub id of a causal language "
            f"model{_found(name, error)}; name one that has the base's vocabulary"
        ) from error


def _found(name: str | Path, error: Exception) -> str:
    """Return in a few words what there is instead of a model, with a comma before it."""
    path = Path(name)
    if not path_exists(path):
        said = str(error).strip().split("\n")[0][:160]
        return f": there is no such folder, and on the hub: {said}"
    if not path.is_dir():
        return ", but a file; pass the folder that it lies in"
    if not (path / CONFIG_NAME).is_file():
        return f": the folder has no {CONFIG_NAME}"
    return f" ({reason_of(error)})"


def write_draft_model(
    folder: str | Path,
    draft: PreTrainedModel,
    *,
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> None:
    """Write a draft model as an ordinary folder of Transformers, with a model card.

    The files are written to a temporary folder, and the weights are read back and compared; then
    they appear together and replace older ones.

    Args:
        folder: Created if it does not exist.
        draft: The model.
        base: The target, whose special tokens end a generation.
        tokenizer: The base's tokenizer; None for none.

    Raises:
        CheckpointError: If the folder holds another model, or the weights read back differently.
    """
    folder = Path(folder)
    require_writable(folder)
    destination = Destination(folder, base)
    draft.config.speclm = {"kind": _KIND, "base": destination.base_id}
    make: Any = GenerationConfig
    draft.generation_config = make(**_special_tokens(base))
    expected = {name: tensor.detach() for name, tensor in draft.state_dict().items()}
    with written_together(folder, last=CONFIG_NAME) as aside:
        draft.save_pretrained(aside, max_shard_size="1000TB")
        if tokenizer is not None:
            tokenizer.save_pretrained(aside, save_jinja_files=False)  # no folder of templates
        card = destination.card(draft_card(draft, base=destination.base_id).render())
        if card is not None:
            write_file(aside / CARD_NAME, card)
        found = load_file(aside / WEIGHTS_NAME)
        names = expected.keys() & found.keys()  # of tied matrices, one is written
        require_same_tensors(
            folder / WEIGHTS_NAME,
            {name: expected[name] for name in names},
            {name: found[name] for name in names},
        )


def require_writable(folder: Path) -> None:
    """Check that a draft model can be written into a folder without destroying anything.

    Raises:
        CheckpointError: If it is a file, or holds a model that no training of drafts has written.
    """
    require_replaceable(
        folder,
        is_mine=lambda _: is_trained_here(folder),
        owner="a draft model that was trained here",
    )


def is_trained_here(folder: Path) -> bool:
    """Return whether a folder's config is that of a draft model which `write_draft_model` wrote."""
    try:
        return bool(read_json(folder / CONFIG_NAME)[_MARK]["kind"] == _KIND)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def read_card(folder: Path) -> HeadsCard:
    """Return the card of the draft model in a folder, which is read completely.

    Raises:
        CheckpointError: If it is damaged, or was not written by `write_draft_model`.
    """
    if not is_trained_here(folder):
        raise CheckpointError(
            f"{folder}: found no draft model of speclm train draft, expected one; name its folder"
        )
    try:
        draft = load_causal_lm(folder, {"dtype": "auto"}, owner="draft model")
    except (OSError, ValueError, RuntimeError) as error:
        if isinstance(error, SpeclmError):
            raise
        raise CheckpointError(
            f"{folder}: the draft model cannot be loaded ({reason_of(error)}), expected the files "
            "of speclm train draft; train or copy it again"
        ) from error
    base = read_json(folder / CONFIG_NAME)[_MARK].get("base")
    return draft_card(draft, base=base if isinstance(base, str) else None)


def draft_card(draft: PreTrainedModel, *, base: str | None = None) -> HeadsCard:
    """Return the model card of a draft model."""
    view, text = TargetView(draft), draft.config.get_text_config()
    return HeadsCard(
        kind="draft-model",
        title="Draft model",
        summary=_SUMMARY,
        facts={
            "architecture": type(draft).__name__,
            "decoder layers": view.num_layers,
            "width": view.hidden_size,
            "output matrix": "the embeddings" if text.tie_word_embeddings else "its own",
        },
        software=_SOFTWARE,
        num_parameters=sum(parameter.numel() for parameter in draft.parameters()),
        dtype=str(draft.dtype).removeprefix("torch."),
        base=base,
    )
