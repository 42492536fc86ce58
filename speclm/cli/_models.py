"""Load a base, its tokenizer and a proposer for commands; bundled ones by default."""

import difflib
import importlib
import inspect
import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from rich.console import Console
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    HqqConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    QuantoConfig,
)
from transformers.utils.logging import disable_progress_bar

from speclm.cli._options import BUNDLED_HEADS, DraftOptions, HeadsOptions, ModelOptions
from speclm.demo.bundle import assets
from speclm.drafting.interface import Proposer
from speclm.errors import OptionError, SpeclmError, UnknownNameError, reason_of
from speclm.files.hub import path_exists
from speclm.methods.registry import heads_names, reads_base_files
from speclm.model import SpecModel
from speclm.model.heads import Heads
from speclm.target.loading import hub_commit, remember_commit
from speclm.tree.plan import TreePlan

_DTYPES = ("auto", "float32", "bfloat16", "float16")
_SMALLER = "pass --quantization, --dtype bfloat16, --device-map auto, or a smaller base"
_DEFAULT_NUM_DRAFT_TOKENS = 16  # of a tree that only --depth bounds
_QUANTIZATIONS: dict[str, tuple[Any, dict[str, Any]]] = {
    "bnb-4bit": (BitsAndBytesConfig, {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}),
    "bnb-8bit": (BitsAndBytesConfig, {"load_in_8bit": True}),
    "quanto-int8": (QuantoConfig, {"weights": "int8"}),
    "quanto-int4": (QuantoConfig, {"weights": "int4"}),
    "hqq-4bit": (HqqConfig, {"nbits": 4}),
}


@dataclass(frozen=True, slots=True)
class Loaded:
    """A base with its proposer and tokenizer."""

    spec: SpecModel
    tokenizer: PreTrainedTokenizerBase

    @property
    def base(self) -> PreTrainedModel:
        """The base."""
        return self.spec.base

    @property
    def commits(self) -> dict[str, str]:
        """Commits on the hub of base and heads for records, where they are known."""
        proposer = self.spec.proposer
        found = {
            "base_commit": hub_commit(self.base),
            "heads_commit": None if proposer is None else proposer.hub_commit,
        }
        return {name: commit for name, commit in found.items() if commit is not None}


def load(options: ModelOptions, *, is_placed: bool = True) -> Loaded:
    """Load the base model and its tokenizer, without a proposer.

    Args:
        options: Options of the command.
        is_placed: Whether the base is moved to its device; one to divide may be too large for it.

    Raises:
        OptionError: If an option has an unusable value, or options exclude each other.
        UnknownNameError: If ``--base`` is not a model.
    """
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    name = str(assets()["base"]) if options.base is None else options.base
    dtype = options.dtype or ("float32" if options.base is None else "auto")
    if dtype not in _DTYPES:
        raise OptionError(f"--dtype is {dtype!r}, expected one of {list(_DTYPES)!r}")
    device = _device(options)
    arguments = {"dtype": dtype, **_quantization(options.quantization)}
    hub: dict[str, Any] = {"revision": options.revision, "cache_dir": options.cache_dir}
    hub = {name: value for name, value in hub.items() if value is not None}
    if options.device_map is not None:
        arguments["device_map"] = options.device_map
    elif options.quantization is not None:
        arguments["device_map"] = {"": device}  # quantised weights are not moved afterwards
    disable_progress_bar()  # type: ignore[no-untyped-call]  # Transformers' own
    if device.type == "cpu" and "device_map" not in arguments:
        _require_memory(name)
    with Console(stderr=True).status(f"loading {Path(name).name}"), _named_if_too_large(name):
        tokenizer, model = _from_pretrained(name, arguments, hub)
        if is_placed and "device_map" not in arguments:
            model = model.to(device)
    if tokenizer.pad_token is None:  # it is masked, so any token will do
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    return Loaded(SpecModel(model, None), tokenizer)


def load_with_heads(
    options: HeadsOptions, *, heads_kwargs: Mapping[str, Any] | None = None
) -> Loaded:
    """Load the base model, its tokenizer and its proposer.

    The default of ``--heads`` is the bundled draft model for the bundled base, and ``"lookup"`` for
    any other base.

    Args:
        options: Options of the command.
        heads_kwargs: Further options of the method.

    Raises:
        OptionError: If an option has an unusable value, or options exclude each other.
        UnknownNameError: If ``--base`` is not a model, or ``--heads`` looks like a misspelt name.
    """
    for module in options.imports or ():
        import_module("--import", module)
    is_bundled = options.base is None
    heads = options.heads or ("draft" if is_bundled else "lookup")
    parts = _parts(heads, is_bundled=is_bundled)
    loaded = load(options)
    found = [_own(part, loaded.base) if _is_own(part) else part for part in parts]
    given = found if len(found) > 1 else found[0] if found else None
    spec = SpecModel.from_pretrained(
        loaded.base,
        given,
        heads_kwargs={**_method_options(options), **(heads_kwargs or {})},
        **_drafting(options),
    )
    return Loaded(spec, loaded.tokenizer)


def _device(options: ModelOptions) -> torch.device:
    """Return the device of ``--device``, or a GPU if there is one."""
    if options.device is not None and options.device_map is not None:
        raise OptionError(
            f"--device is {options.device!r} and --device-map {options.device_map!r}; pass one of "
            "them"
        )
    name = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name, dtype=torch.float32).device
    except (RuntimeError, AssertionError) as error:
        raise OptionError(
            f"--device {name!r} cannot be used ({error}); pass one such as cpu or cuda:0"
        ) from error


def _quantization(name: str | None) -> dict[str, Any]:
    if name is None:
        return {}
    if name not in _QUANTIZATIONS:
        raise OptionError(
            f"--quantization is {name!r}, expected one of {list(_QUANTIZATIONS)!r}; pass one of "
            "them"
        )
    config, arguments = _QUANTIZATIONS[name]
    try:
        return {"quantization_config": config(**arguments)}
    except (ImportError, RuntimeError) as error:
        raise OptionError(
            f"--quantization {name!r} needs a package that is not installed ({error})"
        ) from error


def _require_memory(name: str) -> None:
    """Check that the weights in a folder fit into this machine, which else ends the process."""
    files = Path(name).glob("*.safetensors") if path_exists(name) else ()
    size, memory = sum(file.stat().st_size for file in files), physical_memory()
    if memory is not None and size > memory:
        raise OptionError(
            f"--base {name!r} has {size / 1e9:.1f} GB of weights, and this machine has "
            f"{memory / 1e9:.1f} GB of memory; {_SMALLER}"
        )


def physical_memory() -> int | None:
    """Return the bytes of memory of this machine; None where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None


@contextmanager
def _named_if_too_large(name: str) -> Iterator[None]:
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise OptionError(
            f"--base {name!r} does not fit into memory ({reason_of(error)}); {_SMALLER}"
        ) from error


def _from_pretrained(name: str, arguments: dict[str, Any], hub: dict[str, Any]) -> tuple[Any, Any]:
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(name, **hub)
        model: Any = AutoModelForCausalLM.from_pretrained(name, **arguments, **hub)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if "quantization_config" in arguments and isinstance(error, ImportError):
            raise OptionError(
                f"--quantization needs a package that is not installed ({error})"
            ) from error
        raise UnknownNameError(
            f"--base {name!r} is not a folder or hub id of a causal language model that can be "
            f"loaded ({type(error).__name__}: {error})"
        ) from error
    remember_commit(model, name, hub)
    return tokenizer, model


def _drafting(options: HeadsOptions) -> dict[str, Any]:
    """Return the arguments that the options of trees and of engines stand for."""
    if not isinstance(options, DraftOptions):
        return {}
    num_draft_tokens, engine = options.num_draft_tokens, {"engine": options.engine}
    if options.depth is None:
        return {"tree": options.tree, "num_draft_tokens": num_draft_tokens, **engine}
    if options.tree is not None:
        raise OptionError(
            f"--tree is {options.tree!r} and --depth {options.depth}, expected one of them; a "
            "tree has a depth of its own"
        )
    size = num_draft_tokens or max(_DEFAULT_NUM_DRAFT_TOKENS, options.depth)
    return {"tree": TreePlan(depth=options.depth, num_draft_tokens=size), **engine}


def _method_options(options: HeadsOptions) -> dict[str, Any]:
    """Return the options of the method: what was given of those that some methods take."""
    heads, revision = options.heads, options.heads_revision
    if heads is not None and heads == options.base and not path_exists(heads):
        revision = revision or options.revision  # base and heads in one repository
    given: dict[str, Any] = {"revision": revision, "subfolder": options.heads_subfolder}
    is_repository = heads is not None and "/" in heads and not path_exists(heads)
    if is_repository or reads_base_files(heads, None):
        given["cache_dir"] = options.cache_dir
    if isinstance(options, DraftOptions):
        given |= {"memory": options.memory, "corpus": options.corpus}
        given["token_map"] = options.token_map
    return {name: value for name, value in given.items() if value is not None}


def _is_own(part: Heads) -> bool:
    """Return whether a part of ``--heads`` has the form ``module:Class``."""
    return isinstance(part, str) and re.fullmatch(r"[\w.]+:\w+", part) is not None


def _own(part: Heads, base: PreTrainedModel) -> Heads:
    """Return the proposer or module that ``module:Class`` names.

    A class or function is called with the base if it has a parameter ``target`` or ``base``.
    """
    module_name, _, name = str(part).partition(":")
    module = import_module("--heads", module_name)
    found = getattr(module, name, None)
    if found is None:
        raise UnknownNameError(
            f"--heads has {part!r}, and module {module_name!r} has no {name!r}; correct the name"
        )
    if isinstance(found, Proposer | torch.nn.Module):
        return found
    if not callable(found):
        raise OptionError(
            f"--heads has {part!r}, a {type(found).__name__}, expected a Proposer, its class or a "
            "function that makes one"
        )
    try:
        parameters = inspect.signature(found).parameters
        made: Heads | None = found(**{key: base for key in ("target", "base") if key in parameters})
    except SpeclmError:
        raise
    except Exception as error:
        raise OptionError(
            f"--heads has {part!r}, which cannot be called with the base alone "
            f"({reason_of(error)}); name a function that takes `base` and returns the proposer"
        ) from error
    if made is None:
        raise OptionError(
            f"--heads has {part!r}, which returns None, expected a proposer; let it return one"
        )
    return made


def import_module(option: str, name: str) -> ModuleType:
    """Import a module of the user, also from the current folder.

    Args:
        option: Option that names it, for messages.
        name: Dotted name.

    Raises:
        OptionError: If it cannot be imported.
    """
    folder = str(Path.cwd())
    if folder not in sys.path and "" not in sys.path:
        sys.path.insert(0, folder)
    try:
        return importlib.import_module(name)
    except Exception as error:
        raise OptionError(
            f"{option} names module {name!r}, which cannot be imported "
            f"({type(error).__name__}: {error}); run from its folder, or install it"
        ) from error


def _parts(heads: str, *, is_bundled: bool) -> list[Heads]:
    """Return the parts of ``--heads``; none for "none"."""
    if heads == "none":
        return []
    bundled = {part: assets()[part] for part in BUNDLED_HEADS} if is_bundled else {}
    known = [*bundled, *heads_names()]
    for part in heads.split(","):
        if part in ("", "none"):
            raise OptionError(
                f"--heads is {heads!r}, expected names separated by commas, or 'none'; drop the "
                f"{part!r} in it"
            )
        near = difflib.get_close_matches(part, known, n=1)
        if near and part not in known and "/" not in part and not Path(part).exists():
            raise UnknownNameError(
                f"--heads has {part!r}, which is no folder; did you mean {near[0]!r}? known are "
                f"{known!r}"
            )
    return [bundled.get(part, part) for part in heads.split(",")]
