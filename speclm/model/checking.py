"""Check heads in any format: what they are, whether they fit a base, and equal their source."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from speclm.cards import HeadsCard
from speclm.drafting.base_parts import BaseParts
from speclm.drafting.formats import Engine
from speclm.drafting.heads_folder import hub_id
from speclm.drafting.package import EXPORT_NAME
from speclm.errors import CheckpointError, OptionError
from speclm.files.hub import HubOptions
from speclm.files.weights import read_json
from speclm.methods.finding import find_heads
from speclm.methods.registry import HeadsSource
from speclm.model.exporting import detect_formats, find_base

_SHARED = ("token", "cache_dir", "local_files_only")
"""Options for the hub that heads share with their base and source."""


@dataclass(frozen=True, slots=True)
class HeadsCheck:
    """What `check_heads` found.

    Args:
        method: Method of the heads.
        formats: Names of the formats that the files are in.
        facts: Sizes and further facts by name.
        engines: Software that loads the files.
        provenance: Content of speclm_export.json; empty without one.
        difference: Largest difference of the logits from those of the source, in float32; None
            without a source.
        source: What they were compared with.
    """

    method: str
    formats: tuple[str, ...]
    facts: Mapping[str, str]
    engines: tuple[Engine, ...]
    provenance: Mapping[str, Any]
    difference: float | None = None
    source: str | None = None

    @property
    def is_equal(self) -> bool:
        """Whether nothing differs from the source, bit by bit; true without one."""
        return not self.difference


def check_heads(
    heads: str | Path,
    *,
    base: str | Path | None = None,
    source: str | Path | None = None,
    revision: str | None = None,
    heads_kwargs: Mapping[str, Any] | None = None,
) -> HeadsCheck:
    """Read heads completely, and compare them with their base and their source.

    The logits of the heads and of the source are computed for the same random inputs.

    Args:
        heads: Folder or hub id, in any format that is read.
        base: Folder or hub id of the base, whose vocabulary is compared, and whose matrices are
            used where the heads share them. Only those are read.
        source: Folder or hub id of the heads that these were converted from; by default that in
            their provenance, if it is on the hub, at the commit there.
        revision: Branch, tag or commit of the base on the hub.
        heads_kwargs: Options for the hub, such as ``revision`` of the heads, and for their files,
            such as ``token_map``. ``token``, ``cache_dir`` and ``local_files_only`` apply to the
            base and the source too.

    Raises:
        UnknownNameError: If there are no such heads.
        CheckpointError: If the heads are damaged, or do not fit the base.
        OptionError: If they are no heads, or of another method than the source.

    Example:
        ```python
        from speclm.demo.bundle import assets
        from speclm.model.checking import check_heads

        found = check_heads(assets()["eagle3"], base=assets()["base"])
        assert "vllm" in found.formats
        ```
    """
    found = _find(heads, heads_kwargs)
    assert found.folder is not None
    formats = detect_formats(found.folder, found.method)
    shared = {name: value for name, value in found.hub.items() if name in _SHARED}
    parts = find_base(base, HubOptions(**shared, revision=revision))
    checkpoint = formats[0].read(found.folder, **found.options)
    facts = _facts(found, formats[0].card(checkpoint))
    if parts is not None:
        facts["vocabulary"] = _compare_sizes(checkpoint, parts)
    provenance = _provenance(found.folder)
    given, where = (source, {}) if source is not None else _recorded(provenance)
    options = {**shared, **where}
    # Our own format, the first, names only speclm.
    engines = dict.fromkeys(e for each in formats[1:] or formats for e in each.engines(checkpoint))
    return HeadsCheck(
        method=found.method.name,
        formats=tuple(each.name for each in formats),
        facts=facts,
        engines=tuple(engines),
        provenance=provenance,
        difference=None if given is None else _difference(found, checkpoint, given, options, parts),
        source=None if given is None else str(given),
    )


def _provenance(folder: Path) -> dict[str, Any]:
    path = folder / EXPORT_NAME
    return read_json(path) if path.is_file() else {}


def _recorded(provenance: Mapping[str, Any]) -> tuple[str | None, dict[str, Any]]:
    """Return the hub id of the source of converted heads, and where in it, as far as recorded."""
    found = provenance.get("source")
    found = found if isinstance(found, dict) else {}
    where = {"revision": found.get("commit"), "subfolder": found.get("subfolder")}
    name = hub_id(str(found.get("name") or ""))
    return name, {key: value for key, value in where.items() if value is not None}


def _find(heads: str | Path, options: Mapping[str, Any] | None) -> HeadsSource:
    found = find_heads(heads, options)
    if found.folder is None or not found.method.formats():
        raise OptionError(
            f"heads {str(heads)!r} are of {found.method.name}, expected those of a method with "
            "checkpoint formats, such as a folder of speclm train"
        )
    return found


def _facts(found: HeadsSource, card: HeadsCard) -> dict[str, str]:
    assert found.folder is not None
    weights = found.method.find_weights(found.folder)
    facts = {name: str(value) for name, value in card.facts.items()}
    facts |= {"keys": str(len(weights.files) if weights else 0), "dtype": card.dtype}
    facts |= {"parameters": f"{card.num_parameters:,}", "base recorded": card.base or "none"}
    return facts | ({"commit": found.commit} if found.commit else {})


def _difference(
    found: HeadsSource,
    checkpoint: Any,
    source: str | Path,
    options: Mapping[str, Any],
    base: BaseParts | None,
) -> float:
    """Return the largest difference of logits; infinite if they have other shapes or no numbers."""
    other = _find(source, options)
    if other.method is not found.method:
        raise OptionError(
            f"source {str(source)!r} are heads of {other.method.name}, expected those of "
            f"{found.method.name} as in {str(found.given)!r}; name what they were converted from"
        )
    assert other.folder is not None
    own = found.method.formats()[0]
    matrices: dict[str, Tensor | None] = {"embeddings": None, "lm_weight": None}
    if base is not None:
        matrices = {"embeddings": base.embeddings(), "lm_weight": base.output_matrix()}
    first, second = (
        own.logits(each, **matrices)
        for each in (checkpoint, own.read(other.folder, **found.options))
    )
    if first.shape != second.shape or not torch.isfinite(first - second).all():
        return float("inf")
    return float((first - second).abs().max())


def _compare_sizes(checkpoint: Any, base: BaseParts) -> str:
    """Return the size of the vocabulary, or raise if it is not the base's."""
    matrix = base.output_matrix()
    config = getattr(checkpoint, "config", checkpoint)
    width = getattr(config, "target_hidden_size", config.hidden_size)
    size = config.vocab_size or len(matrix)
    if (size, width) != tuple(matrix.shape):
        raise CheckpointError(
            f"the heads are for a base with {size} tokens and states {width} wide, found "
            f"{matrix.shape[0]} and {matrix.shape[1]} in {base.name!r}; name the base that they "
            "were trained on"
        )
    return f"{size:,} tokens, as the base"
