"""The folder that the server of Transformers serves with drafts: written here, read by it."""

import json
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import transformers
import yaml
from huggingface_hub import metadata_load
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils.import_utils import is_serve_available

from speclm.cards import GENERATED_MARK
from speclm.drafting.base_parts import BaseParts
from speclm.drafting.heads_folder import CARD_NAME, CONFIG_NAME, hub_id, require_folder
from speclm.drafting.package import EXPORT_NAME, link_or_copy
from speclm.errors import (
    CheckpointError,
    OptionError,
    SaveError,
    SpeclmError,
    reason_of,
)
from speclm.files.atomic import folder_written_whole, write_file, write_json
from speclm.files.hub import HubOptions, download, path_exists
from speclm.files.weights import read_json
from speclm.methods.finding import find_heads
from speclm.methods.registry import HeadsSource
from speclm.model.call import Tree, normalize_tree
from speclm.model.engines import normalize_engine
from speclm.model.exporting import find_base
from speclm.serving.record import (
    HEADS_FOLDER,
    OPTION_FILES,
    heads_settings,
    is_export,
    load_served,
    write_record,
)
from speclm.target.loading import load_causal_lm
from speclm.tree.plan import TreePlan

_UNINDEXED = "*mtp*.safetensors"
_SCRIPT = "custom_generate/generate.py"
_CODE = '''\
"""Read by `transformers serve --trust-remote-code`; written by speclm export-server."""

from functools import partial

from speclm.serving import ServedTokenizer, generate  # pip install speclm

__all__ = ["ServedTokenizer", "generate"]
generate = partial(generate, code=__file__)
'''
# The server loads the processor first. One that needs trusted code ends a start without the option,
# with which Transformers would serve the base without drafts and without a message.
_PROCESSOR_NAME = "processor_config.json"
_PROCESSOR = {"auto_map": {"AutoProcessor": "custom_generate/generate.ServedTokenizer"}}
_TOKENIZERS = ("tokenizer*", "vocab*", "*.model", "*.tiktoken", "tekken.json")
_PROCESSORS = (_PROCESSOR_NAME, "preprocessor_config.json", "video_preprocessor_config.json")

_CARD = """\
---
{front}
---

{mark}

# {base}, with drafts by speclm

The files of {base}, and what speclm drafts with: {method}.

The OpenAI-compatible server of Transformers answers with the text of {base}, in fewer forwards.

```bash
pip install "speclm[serving]"
transformers serve --trust-remote-code {folder}
```

```bash
curl http://localhost:8000/v1/chat/completions -H "Content-Type: application/json" \\
  -d '{{"messages": [{{"role": "user", "content": "Hello"}}]}}'
```

- `--trust-remote-code` lets the server import `{script}`, a few lines that import speclm.
- `--continuous-batching` and `--compile` decode by other means, and are refused.
- `save_pretrained` of the loaded model writes neither the code nor the heads: export again.
"""


@dataclass(frozen=True, slots=True)
class ServedFolder:
    """What `export_server` wrote.

    Args:
        folder: The folder.
        method: Name of the method that drafts.
        verification: How drafts are verified; None if the models were not loaded.
        notes: What the user should know before serving it.
        num_bytes: Size of all files, of which weights may be links to those of the base.
    """

    folder: Path
    method: str
    verification: str | None
    notes: tuple[str, ...]
    num_bytes: int

    @property
    def command(self) -> str:
        """The command that serves it on port 8000 of this machine."""
        return f"transformers serve --trust-remote-code {shlex.quote(str(self.folder))}"


def export_server(  # noqa: PLR0913 - its options are keywords
    base: str | Path,
    out: str | Path,
    *,
    heads: str | Path = "lookup",
    revision: str | None = None,
    heads_kwargs: Mapping[str, Any] | None = None,
    num_draft_tokens: int | None = None,
    tree: Tree | None = None,
    engine: str = "auto",
    check: bool = True,
) -> ServedFolder:
    """Write a folder that ``transformers serve --trust-remote-code`` serves with drafts.

    It holds the base's files, those of the heads, and code that makes `generate` speculative when
    the server loads the model. Weights are hard links where the file system has them.

    Args:
        base: Folder or hub id of the base.
        out: New or empty folder, or one that was written by this function, which is replaced.
        heads: Name of a method that needs no files, or folder or hub id of heads or a draft model.
        revision: Branch, tag or commit of the base on the hub.
        heads_kwargs: As for `SpecModel.from_pretrained`, as far as JSON can hold them.
        num_draft_tokens: Maximum draft tokens per round; by default the proposer's own choice.
        tree: As for `SpecModel.from_pretrained`.
        engine: As for `SpecModel.from_pretrained`.
        check: Whether to load base and heads once, on the CPU, and to check that they fit.

    Raises:
        UnknownNameError: If there is no such base, or there are no such heads.
        OptionError: If heads or options cannot be stored in files.
        CheckpointError: If files are missing or damaged, the folder holds something else, or heads
            do not fit the base.
        SaveError: If the files cannot be written; nothing is changed then.

    Example:
        ```python
        from speclm.demo.bundle import assets
        from speclm.serving import export_server

        done = export_server(assets()["base"], "served", heads=assets()["eagle3"])
        print(done.command)
        ```
    """
    folder = Path(out)
    _require_free(folder)
    source = _find_heads(heads, heads_kwargs)
    parts = find_base(base, HubOptions(**{**source.hub, "subfolder": "", "revision": revision}))
    assert parts is not None
    _require_servable(parts)
    tree, engine = _stored_tree(tree), str(normalize_engine(engine))
    settings, files = heads_settings(source)
    settings |= {"tree": tree, "engine": engine, "num_draft_tokens": num_draft_tokens}
    with _saving(folder), folder_written_whole(folder) as aside:
        _link(files, aside / OPTION_FILES)
        notes = _write_files(parts, source, settings, aside, out=folder)
        verification = _verification(aside, parts.architectures[0]) if check else None
    found = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    return ServedFolder(folder, source.method.name, verification, tuple(notes), sum(found))


@contextmanager
def _saving(folder: Path) -> Iterator[None]:
    try:
        yield
    except SpeclmError:
        raise
    except OSError as error:
        raise SaveError(
            f"{folder}: the files cannot be written ({reason_of(error)}), expected a place with "
            "room for them; nothing is changed, make room or choose another folder"
        ) from error


def _require_free(folder: Path) -> None:
    """Check that a folder is new, empty, or an export that can be replaced."""
    with _saving(folder):
        require_folder(folder)
        if Path.cwd().is_relative_to(folder.resolve()):
            raise CheckpointError(
                f"{folder}: found the current folder or one around it, expected another, because "
                "it is replaced whole; change to another folder, or choose one"
            )
        if (folder / ".git").exists():  # an export that is replaced would take its history along
            raise CheckpointError(
                f"{folder}: found a Git repository, expected a folder of the export only; choose "
                "another, and copy its files"
            )
        if is_export(folder):
            return
        names = sorted(each.name for each in folder.iterdir()) if folder.is_dir() else []
        if names:
            raise CheckpointError(
                f"{folder}: found {names[:8]!r}, expected a new or empty folder, or one that "
                "speclm export-server has written; choose another"
            )


def _find_heads(heads: object, options: Mapping[str, Any] | None) -> HeadsSource:
    if not isinstance(heads, str | Path):
        raise OptionError(
            f"heads is a {type(heads).__name__}, expected the name of a method, or the folder or "
            "hub id of heads, which the server can load; save the heads first"
        )
    return find_heads(heads, options)


def _require_servable(base: BaseParts) -> None:
    """Check that the server knows the class of a model, and that the folder is no export itself."""
    names = base.architectures
    kind = getattr(transformers, names[0], None) if names else None
    if not (isinstance(kind, type) and issubclass(kind, PreTrainedModel)):
        raise CheckpointError(
            f"{base.name!r}: its config names the classes {names!r}, expected one of Transformers, "
            "which its server loads; save the base with its save_pretrained, and name that folder"
        )
    if base.folder is not None and (base.folder / EXPORT_NAME).is_file():
        raise OptionError(
            f"base {base.name!r} has {EXPORT_NAME}, so it is an exported folder, expected the base "
            "that it was made of; name that"
        )


def _stored_tree(tree: Tree | None) -> Any:
    plan = normalize_tree(tree)
    return asdict(plan) if isinstance(plan, TreePlan) else plan


def _write_files(
    parts: BaseParts, source: HeadsSource, settings: Mapping[str, Any], folder: Path, *, out: Path
) -> list[str]:
    """Write everything into a folder that will have another name; return the notes."""
    weights = _copy_model(parts, folder)
    if source.method.reads_base_files:
        weights = sorted({*weights, *_link_unindexed(parts, folder)})
    if source.folder is not None:
        _copy_heads(source, folder / HEADS_FOLDER)
    base = {"name": hub_id(parts.name), "commit": parts.commit, "weights": weights}
    write_record(folder, source, settings, base)
    write_file(folder / CARD_NAME, _card(parts, source, out.name))
    notes = _write_code(folder, is_text=_is_text(parts.architectures[0]))
    if "@" in str(out):
        notes.append("The server reads what follows @ as a revision: rename or move the folder.")
    return notes


def _link(files: Mapping[str, Path], folder: Path) -> None:
    for name, path in files.items():
        folder.mkdir(exist_ok=True)
        link_or_copy(path, folder / name)


def _copy_model(parts: BaseParts, folder: Path) -> list[str]:
    """Copy a model without its card; return the names of its files of weights."""
    weights, small = parts.whole()
    source = small[0].parent if small else weights.path.parent
    files = {file.name: source / file.name for file in weights.files.values()}
    _link(files, folder)
    for path in (*small, source / CONFIG_NAME, weights.path):
        if path.name not in files and path.name != EXPORT_NAME:
            write_file(folder / path.name, path.read_bytes())
    return sorted(files)


def _link_unindexed(parts: BaseParts, folder: Path) -> list[str]:
    """Link shards with parts that heads are read from, where no index names them."""
    found = parts.folder
    if found is not None and parts.hub is not None and not path_exists(parts.name):
        found = download(parts.name, parts.hub, (_UNINDEXED,))
    files = {} if found is None else {path.name: path for path in found.glob(_UNINDEXED)}
    _link({name: path for name, path in files.items() if not (folder / name).exists()}, folder)
    return sorted(files)


def _copy_heads(source: HeadsSource, folder: Path) -> None:
    assert source.folder is not None
    if source.method.find_weights(source.folder) is None:  # a draft model, a whole one
        name = source.folder if path_exists(str(source.given)) else str(source.given)
        hub = HubOptions(**source.hub)
        _copy_model(BaseParts.find(name, HubOptions() if path_exists(name) else hub), folder)
        return
    folder.mkdir()
    files = [path for path in sorted(source.folder.iterdir()) if path.is_file()]
    for path in files:
        if path.suffix in (".safetensors", ".bin", ".pt"):
            link_or_copy(path, folder / path.name)
        elif not path.name.startswith("."):
            write_file(folder / path.name, path.read_bytes())


def _write_code(folder: Path, *, is_text: bool) -> list[str]:
    """Write the code that the server runs; return what the user should know."""
    (folder / _SCRIPT).parent.mkdir()
    write_file(folder / _SCRIPT, _CODE)
    notes = []
    if not is_text or any((folder / name).exists() for name in _PROCESSORS):
        notes.append(
            "Without --trust-remote-code the server serves this base without drafts, silently."
        )
    else:
        write_json(folder / _PROCESSOR_NAME, _PROCESSOR)
    path = folder / "generation_config.json"
    if not (path.is_file() and read_json(path).get("do_sample")):
        notes.append(
            "The base's generation config does not sample, so the server ignores temperature and "
            'top_p, unless a request has "generation_config": "{\\"do_sample\\": true}".'
        )
    if not any(path for pattern in _TOKENIZERS for path in folder.glob(pattern)):
        notes.append(
            "The base has no tokenizer, without which the server does not start: save one with its "
            "save_pretrained next to the base, and export again."
        )
    if not _has_chat_template(folder):
        notes.append("The base has no chat template: only /v1/completions answers.")
    if not is_serve_available():
        notes.append('The server needs packages that are missing: pip install "speclm[serving]"')
    return notes


def _has_chat_template(folder: Path) -> bool:
    path = folder / "tokenizer_config.json"
    is_in_config = path.is_file() and bool(read_json(path).get("chat_template"))
    return is_in_config or any(folder.glob("chat_template.*"))


def _card(parts: BaseParts, source: HeadsSource, name: str) -> str:
    front = ["library_name: transformers", "tags:", "- custom_generate", "- speclm"]
    base, card = hub_id(parts.name), None if parts.folder is None else parts.folder / CARD_NAME
    if base is not None:
        front.append(f"base_model: {json.dumps(base)}")
    try:
        known = metadata_load(card) if card is not None and card.is_file() else None
    except (OSError, ValueError, yaml.YAMLError):
        known = None  # anybody's text, which names no licence
    if isinstance(known, dict) and isinstance(known.get("license"), str):
        front.append(f"license: {json.dumps(known['license'])}")
    return _CARD.format(
        front="\n".join(front),
        mark=GENERATED_MARK,
        base=base or "the base",
        method=source.method.summary,
        folder=shlex.quote(name),
        script=_SCRIPT,
    )


def _is_text(architecture: str) -> bool:
    """Return whether a class of Transformers is a language model that reads text only."""
    return architecture in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()


def _verification(folder: Path, architecture: str) -> str:
    """Load an exported folder as the server does, and return how drafts are verified."""
    try:
        if _is_text(architecture):
            base = load_causal_lm(folder, {"dtype": "auto"}, owner="base")
        else:  # a model that reads images too
            base = getattr(transformers, architecture).from_pretrained(folder, dtype="auto")
    except SpeclmError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"the base cannot be loaded as {architecture} ({reason_of(error)}), expected undamaged "
            "files, and the packages and memory that they need; download or save it again, or "
            "export it without the check"
        ) from error
    return str(load_served(base).self_check.verification.value)
