"""Which draft models can be run as a `DraftNetwork`: their classes are read, logits compared."""

import logging
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from speclm.methods.draft_model.network import MAPS, DraftNetwork
from speclm.self_check.fingerprint import changes
from speclm.self_check.verdict import distinct_tokens
from speclm.self_check.watch import first_in_training
from speclm.target import TargetView

_log = logging.getLogger("speclm")

_FAMILIES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
"""Model types of one pattern, and what the names of their classes start with."""

_CLASSES = {
    "embed_tokens": "Embedding",
    "input_layernorm": "RMSNorm",
    "k_norm": "RMSNorm",
    "layers": "ModuleList",
    "lm_head": "Linear",
    "mlp": "MLP",
    "model": "Model",
    "norm": "RMSNorm",
    "post_attention_layernorm": "RMSNorm",
    "q_norm": "RMSNorm",
    "rotary_emb": "RotaryEmbedding",
    "self_attn": "Attention",
}
"""Class of each module by its name: one of PyTorch's, or the family's, without the prefix."""

_NUM_COMPARED, _NUM_BEFORE = 8, 3

# Root mean square over the standard deviation of the logits. Half precision rounds elsewhere: the
# bundled models differ by 0.02 to 0.04 in bfloat16, and by 1e-6 in float32.
_TOLERANCE, _HALF_TOLERANCE = 1e-4, 0.1


def find_obstacle(view: TargetView) -> str | None:
    """Return why a model cannot be run as a `DraftNetwork`; None if it can.

    Its classes have to be those of a known family in Transformers, down to the last module: without
    hooks, adapters, quantisation and replaced methods.
    """
    model = view.model
    kind, family = type(model), model.config.model_type
    prefix, source = _FAMILIES.get(family), f"transformers.models.{family}.modeling_{family}"
    if prefix is None or (kind.__module__, kind.__name__) != (source, f"{prefix}ForCausalLM"):
        return f"{kind.__name__} is not a model of {', '.join(_FAMILIES)}"
    for name, module in model.named_modules():
        if name and not _is_plain(module, name.rpartition(".")[2], f"{source}.{prefix}"):
            return f"{name!r} is a {type(module).__name__} that the family does not have there"
    changed = changes(model)
    if changed or vars(model).get("_compiled_call_impl") is not None:
        return changed[0] if changed else "the model is compiled"
    attentions = [layer.self_attn for layer in cast("Any", model).model.layers]
    if any(attention.layer_idx != index for index, attention in enumerate(attentions)):
        return "layers were removed or exchanged"
    if len({(a.q_proj.out_features, a.k_proj.out_features) for a in attentions}) > 1:
        return "layers have different numbers of heads"
    weights = {(weight.device, weight.dtype) for weight in model.parameters()}
    if len(weights) > 1 or any(device.type == "meta" for device, _ in weights):
        return "its weights have several devices or dtypes, or are not loaded"
    if view.rotary_switch is not None:
        return "its rotation depends on the length of the text"
    training = first_in_training(model)
    return None if training is None else f"{training} is in training mode"


def _is_plain(module: nn.Module, name: str, family: str) -> bool:
    """Return whether a module is what a model of the family has under a name."""
    kind, parameters = type(module), module._parameters
    if name == "act_fn":
        return not parameters and not module._modules
    if not all(type(value) in {nn.Parameter, type(None)} for value in parameters.values()):
        return False  # quantised or sharded
    wanted = "Linear" if name in MAPS else "DecoderLayer" if name.isdecimal() else None
    wanted = wanted or _CLASSES.get(name, "")
    if wanted in {"Embedding", "Linear", "ModuleList"}:
        is_bounded = getattr(module, "max_norm", None) is not None
        return (
            kind is getattr(nn, wanted)
            and parameters.keys() <= {"weight", "bias"}
            and (not is_bounded)
        )
    return f"{kind.__module__}.{kind.__name__}" == family + wanted


@torch.no_grad()
def computes_alike(view: TargetView) -> bool:
    """Return whether a model without an obstacle computes the same as a `DraftNetwork`.

    Compares the logits of a short text, in one forward of each. The model is not changed.
    """
    network, device = DraftNetwork(view.model), view.device
    tokens = distinct_tokens(view, _NUM_COMPARED)[None]
    cache, indices = view.new_cache(tokens.new_zeros(1)), torch.arange(_NUM_COMPARED, device=device)
    causal = (indices <= indices[:, None])[None]
    wanted = view.forward_nodes(tokens, causal, indices[None], cache)[0, _NUM_BEFORE:]
    cache.split(_NUM_BEFORE, num_pending=0)  # the others are written again
    bias = torch.zeros(causal.shape, dtype=network.dtype, device=device)
    bias = bias.masked_fill_(~causal, torch.finfo(bias.dtype).min)[None, :, _NUM_BEFORE:]
    views = network.views(cache, num_new=_NUM_COMPARED - _NUM_BEFORE)
    rotation = network.rotation(_NUM_COMPARED)
    rotation = (
        rotation[0][:, _NUM_BEFORE:_NUM_COMPARED],
        rotation[1][:, _NUM_BEFORE:_NUM_COMPARED],
    )
    hidden = network.forward(
        tokens[:, _NUM_BEFORE:], views, rotation=rotation, bias=bias, cache=cache
    )
    return are_alike(network.logits(hidden, views, batch=1)[0], wanted)


def are_alike(found: Float[Tensor, "rows vocab"], wanted: Float[Tensor, "rows vocab"]) -> bool:
    """Return whether logits are equal within rounding; a sync."""
    bound = _HALF_TOLERANCE if found.dtype.itemsize < 4 else _TOLERANCE
    found, wanted = found.float(), wanted.float()
    difference = (found - wanted).square().mean(1).sqrt()
    return bool((difference <= bound * wanted.std(1, correction=0)).all())  # false for NaN


class CurrentNetwork:
    """The network of a draft model as it is now.

    Attributes:
        obstacle: Why there is none; None if there is one.
    """

    def __init__(self, view: TargetView) -> None:
        """Read a model, and run it once if it has no obstacle."""
        self._view = view
        self._state: list[object] = []
        self._network: DraftNetwork | None = None
        self._is_alike: bool | None = None  # until it was compared
        self.obstacle: str | None = None
        self.look()

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_state": [], "_network": None}  # a copy is of another model object

    def look(self) -> DraftNetwork | None:
        """Return the network; None if there is an obstacle. Cheap if nothing has changed.

        Of weights and buffers, changes in place are noticed, but not those by way of ``.data``.
        """
        model = self._view.model
        state = _state(model)
        if state != self._state:
            self._state, self._network = state, None
            self.obstacle = find_obstacle(self._view)
            if self.obstacle is None and self._is_alike is None:
                try:
                    self._is_alike = computes_alike(self._view)
                except RuntimeError as error:  # sizes that are not usual
                    self._is_alike = False
                    _log.debug("comparing %s failed: %s", self._view.name, error)
            if self.obstacle is None and not self._is_alike:
                self.obstacle = "its logits are not those of the family's usual computation"
            if self.obstacle is None:
                self._network = DraftNetwork(model)
            else:
                _log.debug("%s drafts by its own forward: %s", self._view.name, self.obstacle)
        # Casts of single operations are the model's own.
        return None if torch.is_autocast_enabled(self._view.device.type) else self._network


def _state(model: PreTrainedModel) -> list[object]:
    """Return marks of all modules and weights. Written for speed: each generation calls it."""
    modules: list[nn.Module] = [model]
    config = model.config
    names = ("num_hidden_layers", "sliding_window", "_attn_implementation")
    marks: list[object] = [getattr(config, name, None) for name in names]
    for module in modules:  # grows in the loop
        state = module.__dict__
        modules += [child for child in state["_modules"].values() if child is not None]
        hooks = len(state["_forward_hooks"]), len(state["_forward_pre_hooks"])
        marks += (id(module), len(state), hooks, state["training"], type(module).forward)
        marks += (state.get("scaling"), state.get("variance_epsilon"))
        for weight in (*state["_parameters"].values(), *state["_buffers"].values()):
            if weight is not None:
                version = None if weight.is_inference() else weight._version
                marks += (id(weight), weight.data_ptr(), weight.dtype, version)
    return marks
