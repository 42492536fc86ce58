"""Loads what commands work on: models, tokenizer and proposer, the bundled ones by default."""

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.logging import disable_progress_bar

from speclm.demo.bundle import assets
from speclm.errors import OptionError, UnknownNameError
from speclm.methods.registry import heads_names
from speclm.model import SpecModel
from speclm.model.loading import Heads

BUNDLED_HEADS = ("draft", "medusa", "eagle", "eagle3")
"""Assets that propose for the bundled base."""

HeadsRevision = Annotated[
    str | None, typer.Option(help="Branch, tag or commit of heads or a draft model on the hub.")
]

_DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True, slots=True)
class Loaded:
    """A base with its proposer and tokenizer."""

    spec: SpecModel
    tokenizer: PreTrainedTokenizerBase

    @property
    def base(self) -> PreTrainedModel:
        """The base."""
        return self.spec.base


def load(
    base: str | None,
    heads: str | None,
    *,
    dtype: str | None = None,
    device: str | None = None,
    heads_revision: str | None = None,
) -> Loaded:
    """Load a base model, its tokenizer and what proposes for it.

    Args:
        base: Folder or hub id; None for the bundled model.
        heads: As ``SpecModel.from_pretrained`` takes it, several parted by commas, or "none"; for
            the bundled base also one of `BUNDLED_HEADS`. By default the bundled draft model for
            the bundled base and "ngram" for any other.
        dtype: Of the weights; by default float32 for the bundled model and "auto" for others.
        device: Where both run; by default a GPU if there is one.
        heads_revision: Branch, tag or commit of heads that come from the hub.

    Raises:
        OptionError: If `dtype` is not known.
        UnknownNameError: If `base` is no model, or `heads` is nearly a name.
    """
    is_bundled = base is None
    name = str(assets()["base"]) if base is None else base
    dtype = dtype or ("float32" if is_bundled else "auto")
    if dtype not in _DTYPES:
        raise OptionError(f"--dtype is {dtype!r}, expected one of {list(_DTYPES)!r}")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    disable_progress_bar()  # type: ignore[no-untyped-call]  # Transformers' own
    if heads is None:
        heads = "draft" if is_bundled else "ngram"
    parts = _parts(heads, is_bundled=is_bundled)
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(name)
        model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
    except Exception as error:
        raise UnknownNameError(
            f"--base {name!r} is not a folder or hub id of a causal language model that can be "
            f"loaded ({type(error).__name__}: {error})"
        ) from error
    if tokenizer.pad_token is None:  # it is masked, so any token will do
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    given = parts if len(parts) > 1 else parts[0] if parts else None
    options = None if heads_revision is None else {"revision": heads_revision}
    spec = SpecModel.from_pretrained(model.to(device), given, heads_kwargs=options)
    return Loaded(spec, tokenizer)


def _parts(heads: str, *, is_bundled: bool) -> list[Heads]:
    """Return what ``--heads`` names; nothing for "none"."""
    if heads == "none":
        return []
    bundled = {part: assets()[part] for part in BUNDLED_HEADS} if is_bundled else {}
    known = [*bundled, *heads_names()]
    for part in heads.split(","):
        if part in ("", "none"):
            raise OptionError(
                f"--heads is {heads!r}, expected names parted by commas, or 'none'; drop the "
                f"{part!r} in it"
            )
        near = difflib.get_close_matches(part, known, n=1)
        if near and part not in known and "/" not in part and not Path(part).exists():
            raise UnknownNameError(
                f"--heads has {part!r}, which is no folder; did you mean {near[0]!r}? known are "
                f"{known!r}"
            )
    return [bundled.get(part, part) for part in heads.split(",")]


def read_prompt(prompt: str | None, file: Path | None) -> str:
    """Return the one prompt that was given.

    Raises:
        OptionError: If none or two were given, or the file cannot be read.
    """
    if (prompt is None) == (file is None):
        raise OptionError("expected exactly one of --prompt and --file; pass one of them")
    if file is None:
        return str(prompt)
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(
            f"--file {str(file)!r} cannot be read ({error}); name a text file in UTF-8"
        ) from error
