"""Verification as a stage of fixed shapes, which an engine can compile or record."""

from collections.abc import Sequence
from functools import lru_cache
from time import perf_counter
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from typing_extensions import override

from speclm.acceptance import Accepted
from speclm.acceptance.exact import read_accepted
from speclm.attention import FixedStep, attached, attention_configs, tree_step
from speclm.cache.dynamic_cache import CACHE_NAME
from speclm.cache.fixed import FixedLayer, seen_slots
from speclm.cache.tree_cache import TreeCache
from speclm.devices import is_host
from speclm.engines import Engine, StageRunner, agree
from speclm.errors import UnsupportedModelError
from speclm.kernels import pays
from speclm.target.static_keep import accept_and_keep, padded_parts
from speclm.target.view import TargetView
from speclm.tree.topology import TreeTopology

BUCKETS = (1, 8, 16, 32, 64)
"""Numbers of nodes that a stage is prepared for; larger trees are verified eagerly."""

_ATTENTION_BY_MASK = {"eager", "sdpa"}
"""Implementations of attention that take any mask."""
_KINDS = {"full_attention", "sliding_attention"}


class StaticForward(StageRunner):
    """Verifies drafts by an engine. Forwards that it cannot run are left to the target's view."""

    def __init__(self, target: TargetView, engine: Engine) -> None:
        """Prepare nothing yet."""
        super().__init__(engine, obstacle=engine.obstacle(target.device) or _obstacle(target.model))
        self._target = target
        self._by_layers: dict[tuple[int, ...], VerifyStage] = {}  # features that they return
        self._verified: tuple[Tensor, Tensor] | None = None  # logits and tokens of a whole bucket
        self._booked_seconds = engine.build_seconds

    def describe(self, *, is_used: bool = True) -> str:
        """Return the engine's name, or why drafts are verified eagerly.

        Args:
            is_used: Whether the session verifies with it.
        """
        other = "drafts are chains, images shift positions, or autocast is on"
        reason = self.obstacle or (None if is_used else other)
        if reason is None:
            return self.engine.name
        return f"eager, because {self.engine.name} cannot run: {reason}"

    def take_seconds(self) -> float:
        """Return the time that the engine took to prepare since the last time this was asked."""
        seconds = self.engine.build_seconds - self._booked_seconds
        self._booked_seconds += seconds
        return seconds

    def verify(
        self,
        tokens: Int[Tensor, "batch nodes"],
        topology: TreeTopology,
        cache: TreeCache,
        *,
        max_length: int | None,
    ) -> Float[Tensor, "batch nodes vocab"] | None:
        """Run a tree through the model, as `TargetView.forward_tree` does.

        The first tree also runs as usual, and both results must agree.

        Returns:
            Logits after every node; None if the engine cannot run this forward.
        """
        self._verified, nodes = None, tokens.shape[1]
        bucket = next((size for size in BUCKETS if size >= nodes), None)
        is_static = cache.capacity > 0 and cache.num_pending == 0 and cache.position_shift is None
        if self.obstacle is not None or bucket is None or not is_static:
            return None
        cache.reserve(bucket)
        target, layers = self._target, self._target.tapped.layers
        inputs = _inputs(tokens, topology, cache, bucket=bucket, max_length=max_length)
        if layers not in self._by_layers:
            logits = target.forward_tree(tokens, topology, cache, max_length=max_length)
            expected = [logits] if target.features is None else [logits, target.features]
            self._prove(layers, inputs, cache, expected)
            return logits
        with target.untapped():
            found = self.run(self._by_layers[layers], inputs, cache.parts())
        if found is None:
            return None
        cache.append(nodes)
        if not is_host(tokens.device):
            self._verified = found[0], inputs[0]
        if layers:
            target.features = found[1][:, :nodes]
        return found[0][:, :nodes]

    def accept_greedily(self, topology: TreeTopology, cache: TreeCache) -> Accepted | None:
        """Accept the tree that was verified last, and move its nodes; the host reads once.

        Returns:
            What is accepted, of which the cache does not know; None if the engine cannot run this.
        """
        if self._verified is None:
            return None
        (logits, tokens), self._verified = self._verified, None  # logits are large
        parts = padded_parts(topology, logits.shape[1], batch=len(tokens))
        inputs = [logits, tokens, *parts, cache.lengths]
        found = self.run(accept_and_keep, inputs, cache.arenas, is_repeatable=False)
        return None if found is None else read_accepted(found[0], found[1], topology)

    def _prove(
        self,
        layers: tuple[int, ...],
        inputs: Sequence[Tensor],
        cache: TreeCache,
        expected: Sequence[Tensor],
    ) -> None:
        """Keep a stage for some features if it computes what the usual forward has computed.

        It writes where the usual forward has left its nodes pending; what that wrote is put back.
        """
        model, start = self._target.model, perf_counter()
        nodes = [part.narrow(2, cache.tree_start, cache.num_pending) for part in cache.parts()]
        written = [part.clone() for part in nodes]
        try:
            masks = _masks(model, self._target.windows)
            # A compiler cannot follow the hooks that put the kernel into the model.
            takes_kernel = self.engine.records_calls and pays(self._target.device)
            stage = VerifyStage(model, layers, masks, takes_kernel=takes_kernel)
            found = stage(*inputs, *cache.parts())
        except Exception as error:  # noqa: BLE001 - whatever the model's own code raises
            self.give_up(f"a forward over fixed shapes fails: {type(error).__name__}, {error}")
            return
        finally:
            for part, before in zip(nodes, written, strict=True):
                part.copy_(before)
        if all(map(_agree, found, expected)):
            self._by_layers[layers] = stage
        else:
            self.give_up("the model computes something else over fixed shapes")
        self.engine.build_seconds += perf_counter() - start


class VerifyStage(nn.Module):
    """The target's forward over one tree per row, with keys and values in storage of fixed size."""

    def __init__(
        self,
        model: PreTrainedModel,
        layers: tuple[int, ...],
        masks: dict[str, int | None],
        *,
        takes_kernel: bool = False,
    ) -> None:
        """Hold the model.

        Args:
            model: The target.
            layers: Hidden states to return, see `TargetFeatures`.
            masks: Windows of its layers by type; a single one for a model with one mask.
            takes_kernel: Whether the tree-attention kernel replaces its attention, where it can.
        """
        super().__init__()
        self._model, self._layers, self._masks = model, layers, masks
        self._configs = attention_configs(model) if takes_kernel else None

    @override
    def forward(
        self,
        tokens: Int[Tensor, "batch nodes"],
        depths: Int[Tensor, "batch nodes"],
        ancestors: Bool[Tensor, "batch nodes nodes"],
        lengths: Int[Tensor, " batch"],
        num_padding: Int[Tensor, " batch"],
        max_position: Int[Tensor, ""],
        *storage: Tensor,
    ) -> tuple[Tensor, ...]:
        """Run the nodes, which are written after the longest row.

        Args:
            tokens: Token at each node.
            depths: Depth of each node.
            ancestors: True at ``[i, j]`` if node j is node i or one of its ancestors.
            lengths: Length of each row in the cache, padding included.
            num_padding: Padding at the start of each row.
            max_position: Maximum position, which deeper nodes get.
            *storage: Keys and values of each layer, ``[batch, kv_heads, capacity, head_dim]``.

        Returns:
            Logits after every node, and the hidden states of `layers` if there are any.
        """
        positions = ((lengths - num_padding)[:, None] + depths).clamp(min=0)
        start = lengths.amax()
        slots = start + torch.arange(tokens.shape[1], device=tokens.device)
        nodes, capacity = (depths, ancestors, lengths, num_padding), storage[0].shape[2]

        def bias(window: int | None, dtype: torch.dtype) -> Tensor:
            return _bias(seen_slots(*nodes, capacity=capacity, window=window), dtype)

        layers: list[Any] = [
            FixedLayer(keys, values, slots)
            for keys, values in zip(storage[::2], storage[1::2], strict=True)
        ]
        inputs = {
            "input_ids": tokens,
            "position_ids": torch.minimum(positions, max_position),
            CACHE_NAME: Cache(layers=layers),
            "use_cache": True,
            "output_hidden_states": bool(self._layers),
            "return_dict": True,
        }
        if self._configs is None:
            dtype = self._model.dtype
            masks = {kind: bias(window, dtype) for kind, window in self._masks.items()}
            mask = masks if len(masks) > 1 else next(iter(masks.values()))
            output = self._model(attention_mask=mask, **inputs)
        else:
            step = FixedStep(*nodes, capacity=capacity, bias=bias)
            with attached(self._configs), tree_step(step):
                output = self._model(**inputs)
        if not self._layers:
            return (output.logits,)
        states = [output.hidden_states[layer] for layer in self._layers]
        return output.logits, torch.cat(states, dim=-1)


def _bias(
    seen: Bool[Tensor, "batch 1 nodes capacity"], dtype: torch.dtype
) -> Float[Tensor, "batch 1 nodes capacity"]:
    """Return numbers to add to scores."""
    bias = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
    return bias.masked_fill(~seen, torch.finfo(dtype).min)


def _inputs(
    tokens: Int[Tensor, "batch nodes"],
    topology: TreeTopology,
    cache: TreeCache,
    *,
    bucket: int,
    max_length: int | None,
) -> list[Tensor]:
    """Return the inputs of a `VerifyStage` over `bucket` nodes."""
    batch, nodes = tokens.shape
    depths, ancestors = topology.padded(bucket)
    if len(depths) < batch:
        depths = depths.expand(batch, -1).contiguous()
        ancestors = ancestors.expand(batch, -1, -1).contiguous()
    # The last token is emitted and never fed.
    max_position = torch.iinfo(torch.int32).max if max_length is None else max(max_length - 2, 0)
    padded = tokens.new_zeros(batch, bucket)
    padded[:, :nodes] = tokens
    return [
        padded,
        depths,
        ancestors,
        cache.lengths,
        cache.num_padding,
        _number(max_position, tokens.device),
    ]


@lru_cache(maxsize=16)
def _number(value: int, device: torch.device) -> Tensor:
    return torch.tensor(value, device=device, dtype=torch.long)


def _agree(found: Tensor, expected: Tensor) -> bool:
    """Return whether outputs are equal within rounding, node by node; `found` may have more."""
    rows, nodes = expected.shape[:2]
    if found.dtype != expected.dtype or found.shape[::2] != (rows, expected.shape[2]):
        return False
    return agree(found[:, :nodes], expected)


def _masks(model: PreTrainedModel, windows: set[int | None]) -> dict[str, int | None]:
    """Return the windows of a model's layers by their type.

    Raises:
        UnsupportedModelError: If it uses several, by types that are not known.
    """
    if len(windows) == 1:
        return {"every layer": next(iter(windows))}
    kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or ())
    if kinds != _KINDS or len(windows) != 2 or None not in windows:
        raise UnsupportedModelError(
            f"{type(model).__name__} asks for masks of windows {sorted(map(str, windows))} by "
            f"layers of type {sorted(kinds)}, expected one window, or full and sliding attention; "
            "decode with engine='eager'"
        )
    window = next(iter(windows - {None}))
    return {"full_attention": None, "sliding_attention": window}


def _obstacle(model: PreTrainedModel) -> str | None:
    """Return why no forward of a model has fixed shapes; None if it may."""
    name = model.config._attn_implementation
    name = getattr(name, "previous", name)  # a forward in another thread
    if name not in _ATTENTION_BY_MASK:
        return f"attention {name!r} takes no mask of a tree"
    if any(hasattr(module, "_hf_hook") for module in model.modules()):
        return "weights are moved between devices while it runs"
    devices = {parameter.device for parameter in model.parameters()}
    return None if len(devices) == 1 else f"weights are on {len(devices)} devices"
