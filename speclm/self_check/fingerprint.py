"""Find changes of a model, such as hooks, and compute the key under which verdicts are stored."""

import hashlib
import json
import platform
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from itertools import chain
from pathlib import Path
from types import BuiltinFunctionType, FunctionType
from typing import Any, cast

import torch
import transformers
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from transformers import GenerationConfig, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import output_capturing

from speclm._version import __version__
from speclm.attention import attention_configs
from speclm.kernels import preferred
from speclm.target import TargetView, is_tap, replaced_forward

STEP_METHODS = (
    "__call__",
    "_has_unfinished_sequences",
    "_optimize_model_for_decode",
    "_prefill",
    "_sample",
    "_update_model_kwargs_for_generation",
    "_valid_auto_compile_criteria",
    "create_masks_for_generate",
    "forward",
    "get_compiled_call",
    "prepare_inputs_for_generation",
)
"""Methods of a model that regular generation calls, most of them in each step."""

_KNOWN = frozenset({"torch", "transformers"})  # the version says what their code does


def loop_obstacle(model: PreTrainedModel) -> str | None:
    """Return the replaced part of the decoding loop, if any; no check of logits covers it."""
    for name in ("_sample", "_has_unfinished_sequences"):
        # The loop is looked up on the class, the methods that it calls on the model.
        found = getattr(type(model) if name == "_sample" else model, name)
        function = getattr(found, "__func__", found)
        qualified = (getattr(function, "__module__", None), getattr(function, "__qualname__", None))
        if qualified != (GenerationMixin.__module__, f"GenerationMixin.{name}"):
            return f"{type(model).__name__} has its own {name}, a part of the decoding loop"
    return None


def changes(model: nn.Module) -> list[str]:
    """Return the hooks, methods and classes of a model that are not those of Transformers.

    Returns:
        Words for reasons, starting with the methods that regular generation calls.
    """
    kind, found = type(model), list[str]()
    for name in STEP_METHODS:
        if name in vars(model) and name != "forward":
            found.append(f"{name} of the model object is replaced")
        elif is_foreign(getattr(kind, name, None)):
            found.append(f"{kind.__name__} overrides {name}")
    if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
        found.append("all modules have a forward hook")
    kinds = dict[type, None]()
    for name, module in model.named_modules():
        where = repr(name) if name else "the model"
        if replaced_forward(module) is not None:
            found.append(f"forward of {where} is replaced")
        if foreign_hooks(module):
            found.append(f"{where} has a forward hook")
        kinds[type(module)] = None
    for kind in kinds:
        if not is_known(kind.__module__):
            found.append(f"{kind.__qualname__} is not of Transformers")
        elif is_foreign(cast("Any", kind).forward):
            found.append(f"forward of {kind.__qualname__} is replaced")
    return list(dict.fromkeys(found))


def foreign_hooks(module: nn.Module) -> list[object]:
    """Return the forward hooks and pre-hooks of a module, except those that only read."""
    state = module.__dict__
    hooks = [*state["_forward_hooks"].values(), *state["_forward_pre_hooks"].values()]
    return [hook for hook in hooks if not only_reads(hook)]


def only_reads(hook: object) -> bool:
    """Return whether a hook is speclm's, or one of Transformers' that records hidden states.

    Transformers installs those on a model at the first request for hidden states or attentions.
    """
    return is_tap(hook) or getattr(hook, "__module__", None) == output_capturing.__name__


def is_foreign(function: object) -> bool:
    """Return whether a function, or a function that it wraps, is from another package.

    Wrappers copy the name of the wrapped function, so a function's globals decide.
    """
    layer: Any = function
    while layer is not None:
        origin = getattr(layer, "__globals__", {"__name__": type(layer).__module__})["__name__"]
        if not is_known(origin) and origin.split(".")[0] not in sys.stdlib_module_names:
            return True
        layer = getattr(layer, "__wrapped__", None)
    return False


def is_known(module_name: str) -> bool:
    """Return whether a module is from torch or Transformers."""
    return module_name.split(".", maxsplit=1)[0] in _KNOWN


_FUNCTIONS = (FunctionType, BuiltinFunctionType)
_SIMPLE_TYPES = (bool, int, float, str, type(None))
_IGNORED_SETTINGS = {  # of a config: no effect on computation, or described elsewhere
    "_commit_hash",
    "_name_or_path",
    "architectures",
    "dtype",
    "id2label",
    "label2id",
    "name_or_path",
    "problem_type",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}
_EXERCISED = ("attention", "cache", "kernels", "self_check", "target", "tree")


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """A kind of model.

    Args:
        digest: Hash of class, config, versions, dtype, device, attention implementation, modules
            and a few weights.
        foreign: Classes and functions of packages other than Transformers and torch, compared by
            identity because their names do not say what they do.
        is_lasting: Whether the digest alone identifies the kind, also in other processes.
    """

    digest: str
    foreign: tuple[object, ...]
    is_lasting: bool


class _UnknownError(Exception):
    """A model has a change that cannot be described."""


def fingerprint(target: TargetView) -> Fingerprint | None:
    """Return the properties that distinguish the target from models that may compute otherwise.

    Returns:
        None for a model with hooks, or with methods set on an instance, such as offloaded, patched
        and compiled ones. No two of these share a verdict.
    """
    if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
        return None
    model, foreign = target.model, list[object]()
    try:
        lines = [
            *_versions(),
            _describe_device(target.device),
            *(_describe_config(config, foreign) for config in attention_configs(model)),
            *_describe_modules(model, foreign),
            _describe_weights(model),
        ]
    except _UnknownError:
        return None
    except Exception:  # noqa: BLE001 - from a foreign config; the check runs again
        return None
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    is_release = all("dev" not in version for version in (transformers.__version__, __version__))
    return Fingerprint(digest, tuple(foreign), is_lasting=is_release and not foreign)


def _versions() -> tuple[str, ...]:
    own = (transformers.__version__, str(torch.__version__), __version__)
    return (*own, platform.python_version(), platform.machine(), _own_sources())


@cache
def _own_sources() -> str:
    """Return a hash of the code that the check runs, which also changes between releases."""
    digest = hashlib.sha256()
    root = Path(__file__).parents[1]
    for name in _EXERCISED:
        for path in [root / f"{name}.py", *sorted((root / name).rglob("*.py"))]:
            if path.exists():
                digest.update(path.read_bytes())
    return digest.hexdigest()


@cache
def _source_of(module_name: str) -> str:
    """Return a hash of a modeling file, which people may edit in place."""
    path = getattr(sys.modules[module_name], "__file__", None)
    return hashlib.sha256(Path(path).read_bytes()).hexdigest() if path else ""


def _describe_device(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    kernel = preferred(device).backend  # computes tree attention
    # Some builds of PyTorch rename its package, not the module.
    return f"{name} {kernel} {import_module('triton').__version__ if kernel == 'triton' else ''}"


def _describe_config(config: PretrainedConfig, foreign: list[object]) -> str:
    implementation = config._attn_implementation
    for registered in (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS):
        function = cast("Any", registered).get(implementation)
        if function is not None:
            _note_function(function, foreign)
    experts = getattr(config, "_experts_implementation", None)
    settings = json.dumps(_relevant(config.to_dict()), sort_keys=True, default=_to_json)
    return f"{_name(type(config))} {implementation} {experts} {settings}"


def _relevant(settings: Any) -> Any:
    if not isinstance(settings, dict):
        return settings
    return {
        str(name): _relevant(value)
        for name, value in settings.items()
        if name not in _IGNORED_SETTINGS
    }


def _to_json(value: object) -> str:
    if isinstance(value, torch.dtype | torch.device):
        return str(value)
    raise _UnknownError  # its text may hold an address, or say too little


def _describe_modules(model: nn.Module, foreign: list[object]) -> Iterator[str]:
    classes: dict[type, None] = {}
    for name, module in model.named_modules():
        state = vars(module)
        if foreign_hooks(module) or "_hf_hook" in state:
            raise _UnknownError
        if state.get("_compiled_call_impl") is not None:
            raise _UnknownError
        classes[type(module)] = None
        yield f"{name} {_name(type(module))} {''.join(_describe_state(module, state))}"
    for kind in classes:
        _note_class(kind, foreign)
    for module_name in dict.fromkeys(kind.__module__ for kind in classes):
        if is_known(module_name) and "modeling_" in module_name:
            yield _source_of(module_name)
            for value in vars(sys.modules[module_name]).values():
                if isinstance(value, FunctionType):
                    _note_function(value, foreign)


def _describe_weights(model: nn.Module) -> str:
    """Return one number of each parameter and buffer; syncs once for each device.

    The verdict on chains may depend on weights: some models apply a bound only in chains, and only
    some trained numbers exceed it.
    """
    samples: dict[torch.device, list[Tensor]] = {}
    for parameter in chain(model.parameters(), model.buffers()):
        if parameter.numel() and parameter.device.type != "meta":
            middle = parameter.detach().reshape(-1)[parameter.numel() // 2]
            samples.setdefault(parameter.device, []).append(middle.float())
    return str([torch.stack(numbers).tolist() for numbers in samples.values()])


def _describe_state(module: nn.Module, state: dict[str, Any]) -> Iterator[str]:
    """Describe the parameters of a module and its simple attributes, some of which are settings."""
    for name, parameter in module._parameters.items():
        if parameter is not None:
            kind = type(parameter)
            shape = tuple(parameter.shape)
            yield f"{name} {_name(kind)} {parameter.dtype} {parameter.device.type} {shape},"
    for name, value in state.items():
        if name in {"training", "generate"}:  # patch() puts one there
            continue
        if name.startswith("_") and not callable(value):
            continue
        if isinstance(value, _SIMPLE_TYPES):
            yield f"{name}={value!r},"
        elif isinstance(value, _FUNCTIONS) and name != "forward" and is_known(value.__module__):
            yield f"{name}={_name(value)},"
        elif callable(value):  # a method set on this instance
            raise _UnknownError
        elif not is_known(type(module).__module__):
            yield f"{name}={_describe_value(value)},"


def _describe_value(value: object) -> str:
    """Describe an attribute of a foreign class, whose code may use it in any way."""
    if value is None or isinstance(value, (*_SIMPLE_TYPES, torch.dtype, torch.device)):
        return repr(value)
    if isinstance(value, PretrainedConfig | GenerationConfig):
        return _name(type(value))  # described separately, or only used by calls
    if isinstance(value, dict):
        return str([[_describe_value(key), _describe_value(kept)] for key, kept in value.items()])
    if isinstance(value, list | tuple | set | frozenset):
        return str([_describe_value(kept) for kept in value])
    raise _UnknownError


def _note_class(kind: type, foreign: list[object]) -> None:
    if not is_known(kind.__module__):
        foreign.append(kind)
    own = [value for value in vars(kind).values() if isinstance(value, FunctionType)]
    for function in [*(getattr(kind, name, None) for name in STEP_METHODS), *own]:
        _note_function(function, foreign)


def _note_function(function: object, foreign: list[object]) -> None:
    """Append a function of another package to `foreign`."""
    if is_foreign(function):
        foreign.append(function)


def _name(thing: Any) -> str:
    return f"{thing.__module__}.{thing.__qualname__}"
