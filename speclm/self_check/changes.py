"""Find changes of a model beyond the code of Transformers, such as hooks and overridden methods."""

import sys
from typing import Any, cast

from torch import nn
from torch.nn.modules import module as torch_module
from transformers import GenerationMixin, PreTrainedModel
from transformers.utils import output_capturing

from speclm.target import is_tap, replaced_forward

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
    """Return which part of the decoding loop the model replaces; no check of logits covers it."""
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
