"""Convert heads from one checkpoint format to another, with a card and their provenance."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from speclm._version import __version__
from speclm.cards import HeadsCard
from speclm.drafting.base_parts import BaseParts
from speclm.drafting.formats import CheckpointFormat, Engine
from speclm.drafting.heads_folder import (
    CONFIG_NAME,
    hub_id,
    replaceable_card,
    require_folder,
)
from speclm.drafting.package import EXPORT_NAME, Package, write_package
from speclm.errors import CheckpointError, OptionError, UnknownNameError, suggest
from speclm.files.hub import HubOptions, path_exists
from speclm.files.weights import read_json
from speclm.methods.finding import find_heads
from speclm.methods.registry import HeadsSource, Method, registered_methods


@dataclass(frozen=True, slots=True)
class Conversion:
    """What `convert_heads` wrote.

    Args:
        folder: Folder of the converted heads.
        method: Name of their method.
        source: Format that they were in.
        format: Format that they are in.
        engines: Software that loads them.
        notes: What the user should know about the result.
        num_bytes: Size of all files.
    """

    folder: Path
    method: str
    source: str
    format: str
    engines: tuple[Engine, ...]
    notes: tuple[str, ...]
    num_bytes: int


def convert_heads(
    heads: str | Path,
    out: str | Path,
    *,
    to: str,
    base: str | Path | BaseParts | None = None,
    revision: str | None = None,
    heads_kwargs: Mapping[str, Any] | None = None,
) -> Conversion:
    """Write heads in another checkpoint format; needs neither a GPU nor, usually, the base.

    Tensors are copied one after the other, so heads may be larger than the memory.

    Args:
        heads: Folder or hub id, in any format that is read.
        out: Folder to write: a new or empty one, or one with heads in the same format.
        to: Name of the format; see `format_names`.
        base: Folder or hub id of the base, for formats that embed its matrices. Only those are
            read. Heads of a merged model have that model as their base, whatever is named here.
        revision: Branch, tag or commit of the base on the hub.
        heads_kwargs: Options for the hub, such as ``revision`` of the heads, and for their files,
            such as ``token_map``. ``token``, ``cache_dir``, ``local_files_only`` and
            ``force_download`` apply to the base too.

    Raises:
        UnknownNameError: If there are no such heads, or the method has no such format.
        CheckpointError: If the heads are damaged, or the format cannot hold them; the message says
            which part, and what to do.
        OptionError: If they are no heads but a draft model, or a revision is not of a base on the
            hub.
        SaveError: If the files cannot be written; nothing is changed then.

    Example:
        ```python
        from speclm.demo.bundle import assets
        from speclm.model.exporting import convert_heads

        done = convert_heads(assets()["eagle3"], "for-vllm", to="vllm")
        print(done.engines[0].versions)
        ```
    """
    source = find_heads(heads, heads_kwargs)
    folder = _folder_of(source)
    target = find_format(source.method, to)
    found = detect_formats(folder, source.method)[0]
    checkpoint = found.read(folder, **source.options)
    is_whole = found.is_of_whole_model(checkpoint)
    parts = _whole_model(source) if is_whole else _own_base(source, base, revision)
    made_of = _provenance(source, found.name)
    return write_format(
        Path(out), checkpoint, target, method=source.method, base=parts, source=made_of
    )


def _folder_of(source: HeadsSource) -> Path:
    """Return the folder of heads that can be converted."""
    name, has_formats = str(source.given), bool(source.method.formats())
    if source.folder is None and has_formats:
        raise OptionError(
            f"heads {name!r} are part of the base's own files, expected the folder or hub id of "
            "heads, such as those that speclm train or save_pretrained writes; save them first"
        )
    if source.folder is None or not has_formats:
        raise OptionError(
            f"heads {name!r} are of {source.method.name}, which has no formats; expected heads "
            "such as those of speclm train; a draft model needs no conversion, other software "
            "loads it as it is"
        )
    return source.folder


def _provenance(source: HeadsSource, name: str) -> dict[str, Any]:
    """Return where heads come from, as it is recorded; paths are not."""
    where = {"commit": source.commit, "subfolder": source.hub.get("subfolder")}
    return {"name": hub_id(str(source.given)), **where, "format": name}


def _own_base(
    source: HeadsSource, base: str | Path | BaseParts | None, revision: str | None
) -> BaseParts | None:
    return find_base(base, HubOptions(**{**source.hub, "subfolder": "", "revision": revision}))


def _whole_model(source: HeadsSource) -> BaseParts:
    """Return the model that heads are a part of."""
    assert source.folder is not None
    if source.commit is None:
        return BaseParts.find(source.folder)
    return BaseParts.find(str(source.given), HubOptions(**source.hub))


def find_base(base: str | Path | BaseParts | None, hub: HubOptions) -> BaseParts | None:
    """Return the parts of a base, if there is one.

    Raises:
        OptionError: If there is a revision, but no base on the hub.
    """
    is_on_hub = isinstance(base, str) and not path_exists(base)
    if hub.revision is not None and not is_on_hub:
        raise OptionError(
            f"revision is {hub.revision!r} and base {base!r}, expected the hub id of a base; leave "
            "revision out, or pass that"
        )
    return BaseParts.find(base, hub) if isinstance(base, str | Path) else base


def write_format(
    folder: Path,
    checkpoint: Any,
    target: CheckpointFormat[Any],
    *,
    method: Method,
    base: BaseParts | None,
    source: Mapping[str, Any],
    repo_id: str | None = None,
) -> Conversion:
    """Write heads in a format, with a model card and their provenance; see `convert_heads`.

    Args:
        folder: Folder to write.
        checkpoint: The heads, as the format's `read` returns them.
        target: The format.
        method: Their method.
        base: Their base, if it is known.
        source: Where they come from, as it is recorded.
        repo_id: Repository on the hub that the folder is uploaded to, if any.
    """
    _require_free(folder, target)
    _require_width(checkpoint, base)
    package = target.pack(checkpoint, base)
    _require_no_rest(folder, package)
    engines = target.engines(checkpoint)
    base_id = hub_id(base.name) if base else checkpoint.base_name_or_path
    provenance = {
        "speclm_version": __version__,
        "method": method.name,
        "format": target.name,
        "source": dict(source),
        "base": {"name": base_id, "commit": base.commit if base else None},
        "engines": [asdict(engine) for engine in engines],
        "notes": list(package.notes),
        **package.facts,
    }
    files = {**package.files, EXPORT_NAME: json.dumps(provenance, indent=2) + "\n"}
    card = target.card(checkpoint)
    card = replace(card, base=base_id or card.base, repo_id=repo_id)
    card = replace(card, software=_software(card, target, engines, package))

    def check(aside: Path) -> None:
        _require_format(folder, target, detect_formats(aside, method))
        if target.read(aside).choices != checkpoint.choices:
            lost.append("The format has no room for the static tree, which is left out.")

    lost: list[str] = []
    text = replaceable_card(folder, card.render())
    write_package(folder, replace(package, files=files), card=text, check=check)
    written = [folder / name for name in (*package.weights, *files, CONFIG_NAME)]
    num_bytes, notes = sum(path.stat().st_size for path in written), [*package.notes, *lost]
    names = (method.name, str(source["format"]), target.name)
    return Conversion(folder, *names, engines, tuple(notes), num_bytes)


def format_names() -> dict[str, list[str]]:
    """Return the names of all formats that can be written, by method."""
    methods = registered_methods().values()
    return {m.name: [each.name for each in m.formats()] for m in methods if m.formats()}


def find_format(method: Method, name: str) -> CheckpointFormat[Any]:
    """Return a format of a method by name.

    Raises:
        UnknownNameError: If it has none of that name.
    """
    formats = {each.name: each for each in method.formats()}
    if name not in formats:
        raise UnknownNameError(
            f"heads of {method.name} have no format {name!r}, expected one of "
            f"{sorted(formats)!r}; {suggest(name, formats)}"
        )
    return formats[name]


def detect_formats(folder: Path, method: Method) -> list[CheckpointFormat[Any]]:
    """Return the formats of the heads in a folder, found by their keys and config.

    Raises:
        CheckpointError: If the folder holds no heads of the method.
    """
    source, path = method.find_weights(folder), folder / CONFIG_NAME
    config = read_json(path) if path.is_file() else {}
    formats = method.formats()
    found = [] if source is None else [each for each in formats if each.detect(source, config)]
    if not found:
        raise CheckpointError(
            f"{folder}: found no heads of {method.name} in a known format, expected those of "
            f"{[each.name for each in formats]!r}; download them again"
        )
    return found


def _require_free(folder: Path, target: CheckpointFormat[Any]) -> None:
    """Check that a folder is new or empty, or holds heads in the same format."""
    require_folder(folder)
    above = next((path for path in folder.resolve().parents if path.exists()), folder)
    if above.is_file():
        raise CheckpointError(
            f"{folder}: found the file {above}, expected a folder there; choose another place"
        )
    path = folder / EXPORT_NAME
    if path.is_file() and read_json(path).get("format") == target.name:
        return
    names = sorted(each.name for each in folder.iterdir()) if folder.is_dir() else []
    if names:
        raise CheckpointError(
            f"{folder}: found {names[:8]!r}, expected a new or empty folder, or one with heads in "
            f"the format {target.name!r}; choose another folder"
        )


def _require_format(
    folder: Path, target: CheckpointFormat[Any], found: list[CheckpointFormat[Any]]
) -> None:
    if target not in found:
        raise CheckpointError(
            f"{folder}: the files read back in another format than {target.name!r}; report "
            "this with the config of the heads"
        )


def _require_no_rest(folder: Path, package: Package) -> None:
    """Check that no weights would stay in a folder next to the new ones, such as another base's."""
    found = {
        path.name for suffix in ("safetensors", "bin", "pt") for path in folder.glob(f"*.{suffix}")
    }
    rest = sorted(found - package.weights.keys() - package.files.keys())
    if rest:
        raise CheckpointError(
            f"{folder}: found weights {rest[:8]!r} that the new files do not replace, and that "
            "software may load too, expected none; choose another folder, or delete them"
        )


def _require_width(checkpoint: Any, base: BaseParts | None) -> None:
    """Check that heads read hidden states as wide as their base's config says."""
    if base is None:
        return
    config, found = getattr(checkpoint, "config", checkpoint), base.hidden_size
    width = getattr(config, "target_hidden_size", config.hidden_size)
    if found not in (None, width):
        raise CheckpointError(
            f"the heads are for a base with states {width} wide, found {found} in {base.name!r}; "
            "name the base that they were trained on"
        )


def _software(
    card: HeadsCard, target: CheckpointFormat[Any], engines: tuple[Engine, ...], package: Package
) -> str:
    """Return the part of a card that says what loads the files, and how."""
    base, heads = card.base or "path/to/base", card.repo_id or "path/to/this/folder"
    lines = [f"The files are in the layout of {target.title}.", *package.notes]
    for engine in engines:
        lines += [f"### {engine.name}", f"Versions: {engine.versions}. {engine.note}".strip()]
        if engine.command:
            lines.append(f"```bash\n{engine.command_for(base=base, heads=heads)}\n```")
    return "\n\n".join(lines)
