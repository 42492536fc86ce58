"""The view of a Hugging Face causal language model: its parts, and forwards over trees."""

import inspect
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicSlidingWindowLayer

from speclm.attention import TreeStep, attached, attention_configs, tree_step
from speclm.cache.dynamic_cache import CACHE_NAME
from speclm.cache.tree_cache import Allocate, TreeCache
from speclm.errors import PromptError, UnsupportedModelError
from speclm.forking import temporary
from speclm.kernels import pays
from speclm.target.features import FeatureTap, TargetFeatures, last_logits
from speclm.target.images import with_images
from speclm.target.logits import (
    device_of,
    embedding_matrix,
    find_decoder,
    head_shape,
    logits_from,
)
from speclm.target.rotary import RotarySwitch, rotary_switch
from speclm.tree.topology import TreeTopology


class TargetView:
    """Run forwards of a causal language model over prompts and trees.

    Forwards leave the model unchanged: attention implementation, parameters and mode are the
    caller's.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        if not isinstance(model, PreTrainedModel):
            raise UnsupportedModelError(
                f"model is a {type(model).__name__}, expected a Transformers PreTrainedModel; "
                "load one with AutoModelForCausalLM.from_pretrained, and of a PEFT model pass "
                "get_base_model()"
            )
        if model.config.is_encoder_decoder or not model.can_generate():
            raise UnsupportedModelError(
                f"{type(model).__name__} is not a decoder-only language model with generate(); "
                "load one with AutoModelForCausalLM.from_pretrained"
            )
        self.model = model
        self._text_config = model.config.get_text_config()
        self._configs = attention_configs(model)
        self.features: Float[Tensor, "batch nodes hidden"] | None = None
        """Hidden states of the last forward, inside `decoding` with features."""
        self.windows: set[int | None] = set()  # of the masks asked for by the last nodes' forward
        self._tap: FeatureTap | None = None  # inside `decoding`
        self._running_thread: int | None = None  # of a forward of this view

    def refresh(self) -> None:
        """Read the model's configs again, after parts of it may have been replaced."""
        self._text_config = self.model.config.get_text_config()
        self._configs = attention_configs(self.model)

    @property
    def vocab_size(self) -> int:
        """Width of the logits, which may exceed the tokenizer's vocabulary."""
        return head_shape(self.model)[0]

    @property
    def hidden_size(self) -> int:
        """Width of the hidden states that the head reads."""
        return head_shape(self.model)[1]

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return int(self._text_config.num_hidden_layers)

    @property
    def device(self) -> torch.device:
        """Device for token ids."""
        return device_of(self.model)

    @property
    def decoder(self) -> nn.Module:
        """Module whose output the head reads."""
        return find_decoder(self.model)

    @property
    def max_positions(self) -> int | None:
        """Maximum positions of the model; None if it has no bound."""
        switch = self.rotary_switch
        if switch is not None and switch.is_gradual:
            return None  # it grows with the text
        return getattr(self._text_config, "max_position_embeddings", None)

    @property
    def rotary_switch(self) -> RotarySwitch | None:
        """Where the rotation of keys changes; None if it never does."""
        return rotary_switch(self.model)

    def tree_obstacle(self) -> str | None:
        """Return what in the model rules out trees, even if a short test of them may pass."""
        config = self._text_config
        kinds = set(getattr(config, "layer_types", None) or ())
        if getattr(config, "attention_chunk_size", None) or "chunked_attention" in kinds:
            return "attention in chunks is not expressed as a window"
        if other := kinds - {"full_attention", "sliding_attention"}:
            return f"layers of type {', '.join(sorted(other))} may see more than positions show"
        if "position_ids" not in inspect.signature(type(self.model).forward).parameters:
            return f"{type(self.model).__name__} takes no position_ids, and counts slots itself"
        if getattr(config, "alibi", False):
            return "ALiBi biases attention by slot, where siblings share a position"
        for name, buffer in self.model.named_buffers():
            if _is_band(buffer):
                return f"{name} masks by slot, where siblings share a position"
        return None

    def require_masked_windows(self) -> None:
        """Check that masks hide the slots that regular generation's cache drops.

        Otherwise tokens that are fed together see more than each would by itself. Runs a forward
        of one token if the cache has sliding windows.

        Raises:
            UnsupportedModelError: If a mask shows such slots.
        """
        layers = DynamicCache(config=self.model.config.get_text_config(decoder=True)).layers
        kept = {
            layer.sliding_window for layer in layers if isinstance(layer, DynamicSlidingWindowLayer)
        }
        if not kept:
            return
        token = torch.zeros(1, 1, dtype=torch.long, device=self.device)
        step = TreeStep(None, token, self.new_cache(token[0]))
        with attached(self._configs), tree_step(step):
            self.model(input_ids=token, use_cache=False)
        if not kept <= step.windows:
            raise UnsupportedModelError(
                f"regular generation drops slots before a window of {min(kept - step.windows)}, "
                "which the model's masks show; it decodes one token at a time"
            )

    @property
    def name(self) -> str:
        """Name or path for messages."""
        return self.model.config.name_or_path or type(self.model).__name__

    def require_prompt_fits(self, num_tokens: int) -> None:
        """Check the length of a prompt.

        Raises:
            PromptError: If it exceeds `max_positions`.
        """
        if self.max_positions is not None and num_tokens > self.max_positions:
            raise PromptError(
                f"prompt has {num_tokens} tokens, {self.name} has max_position_embeddings "
                f"{self.max_positions}; shorten the prompt, e.g. with truncation=True"
            )

    def new_cache(
        self, num_padding: Int[Tensor, " batch"], *, allocate: Allocate | None = None
    ) -> TreeCache:
        """Return an empty cache for prompts with the given left padding; see `TreeCache`."""
        return TreeCache(num_layers=self.num_layers, num_padding=num_padding, allocate=allocate)

    def prefill(
        self,
        tokens: Int[Tensor, "batch seq"] | Float[Tensor, "batch seq hidden"],
        cache: TreeCache,
        *,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        images: Mapping[str, Any] | None = None,
    ) -> Float[Tensor, "batch vocab"]:
        """Run the prompt, or the part that is not cached, through the model and commit it.

        Args:
            tokens: Uncached tokens of the prompts, padded on the left; or their embeddings.
            cache: Empty cache, or one that holds equally many slots of every row.
            attention_mask: Mask of cached and new slots; None without padding.
            position_ids: Position ids of the new slots or of all; None to count tokens.
            images: Other inputs of the whole prompt.

        Returns:
            Logits after the last prompt token.
        """
        num_new = tokens.shape[1]
        if position_ids is None:
            slots = torch.arange(num_new, device=tokens.device) + cache.tree_start
            position_ids = (slots - cache.num_padding[:, None]).clamp(min=0)
        last = last_logits(self._text_config, self.tapped)
        inputs: dict[str, Any] = {CACHE_NAME: cache, "logits_to_keep": last}
        inputs |= {"attention_mask": attention_mask, "position_ids": position_ids[..., -num_new:]}
        cache.reserve(num_new)
        with attached(self._configs):
            if images:
                inputs = with_images(self.model, tokens, images, inputs)
                logits: Tensor = self.run(**inputs).logits
            else:
                logits = self._forward(tokens, **inputs)
        cache.append(num_new)
        cache.commit_prompt()
        return logits[:, -1]

    def forward_tree(
        self,
        tokens: Int[Tensor, "batch nodes"],
        topology: TreeTopology,
        cache: TreeCache,
        *,
        prompt: Int[Tensor, "batch seq"] | None = None,
        max_length: int | None = None,
    ) -> Float[Tensor, "batch nodes vocab"]:
        """Run a whole tree through the model; its nodes become pending in the cache.

        Args:
            tokens: Token at each node.
            topology: Shape of the trees.
            cache: Cache whose committed slots every node sees.
            prompt: Uncached tokens before the roots, padded on the left, which the same forward
                reads and commits. All rows of the cache must be equally long.
            max_length: Maximum tokens of a row. Nodes beyond it get the last position before it,
                because learned positions may end there; their logits are not used.

        Returns:
            Logits after every node.
        """
        depths = topology.depths
        # The last token is emitted and never fed.
        max_position = None if max_length is None else max(max_length - 2, 0)
        if prompt is None:
            has_kernels = pays(depths.device)  # which read the words
            return self.forward_nodes(
                tokens,
                None if has_kernels else topology.ancestor_mask,
                depths,
                cache,
                words=topology.ancestor_words if has_kernels or topology.is_on_host else None,
                max_position=max_position,
            )
        cached, start = cache.tree_start, prompt.shape[1]
        slots = torch.arange(start, device=depths.device).expand(len(depths), -1)
        logits = self.forward_nodes(
            torch.cat([prompt, tokens], dim=1),
            _below_prompt(topology.ancestor_mask, cache.num_padding - cached, start),
            torch.cat([slots, start + depths], dim=1),
            cache,
            num_logits=tokens.shape[1],
            max_position=max_position,
        )
        cache.split(cached + start, num_pending=tokens.shape[1])
        return logits

    def forward_nodes(
        self,
        tokens: Int[Tensor, "batch nodes"],
        visible: Bool[Tensor, "rows nodes slots"] | None,
        slot_depths: Int[Tensor, "depth_rows slots"],
        cache: TreeCache,
        *,
        words: Int[Tensor, "rows nodes words"] | None = None,
        num_logits: int = 0,
        max_position: int | None = None,
    ) -> Float[Tensor, "batch scored vocab"]:
        """Run nodes through the model, below those that are already pending.

        Args:
            tokens: Token at each new node.
            visible: True at ``[i, j]`` if new node i sees pending slot j; the last slots are the
                new nodes. None if there are `words`, or for a single new node that sees all.
            slot_depths: Depth of each slot; depth 0 follows the committed tokens of its row.
            cache: Cache whose committed slots every node sees.
            words: `visible` packed into words, if the caller has them.
            num_logits: Number of last nodes to compute logits for; 0 for all.
            max_position: Maximum position, which deeper nodes get; None for no bound.

        Returns:
            Logits after every new node, or the last `num_logits`.
        """
        num_nodes = tokens.shape[1]
        cache.reserve(num_nodes)
        roots = cache.lengths - cache.num_padding
        position_ids = (roots[:, None] + slot_depths[:, -num_nodes:]).clamp_(
            min=0, max=max_position
        )
        if cache.position_shift is not None:
            position_ids = position_ids + cache.position_shift[..., None]
        step = TreeStep(visible, slot_depths, cache, words=words)
        with attached(self._configs), tree_step(step):
            logits = self._forward(
                tokens, position_ids=position_ids, logits_to_keep=num_logits, **{CACHE_NAME: cache}
            )
        self.windows = step.windows
        cache.append(num_nodes)
        return logits

    def stored_embeddings(self, tokens: Int[Tensor, "*rows"]) -> Float[Tensor, "*rows hidden"]:
        """Return rows of the embedding matrix, without the factor of some models."""
        return F.embedding(tokens, self.embedding_weight)

    @property
    def embedding_weight(self) -> Float[Tensor, "vocab hidden"]:
        """The stored embedding matrix.

        Raises:
            UnsupportedModelError: If it is quantised or offloaded.
        """
        return embedding_matrix(self.model)

    def head_logits(self, hidden: Float[Tensor, "*rows hidden"]) -> Float[Tensor, "*rows vocab"]:
        """Return the model's logits for hidden states after the final norm."""
        return logits_from(self.model, hidden)

    @contextmanager
    def decoding(self, features: TargetFeatures = TargetFeatures.NONE) -> Iterator[None]:
        """Read features during the forwards of one generation, which holds the model exclusively.

        The model's own `generate` may run at the same time, in any thread.

        Args:
            features: The hidden states that forwards store in the attribute `features`.
        """
        # Models may have no decoder apart from their head; without features none is needed.
        decoder = self.decoder if features.layers else self.model
        self._tap = FeatureTap(features, is_own=self._is_running, take=self._take)
        with temporary(self._forget), self._tap.on(decoder, self.num_layers):
            yield

    @property
    def tapped(self) -> TargetFeatures:
        """The features that forwards read at present."""
        return TargetFeatures.NONE if self._tap is None else self._tap.features

    @contextmanager
    def untapped(self) -> Iterator[None]:
        """Read no features inside the block, in which the model has no hooks of this view."""
        with self._tap.off() if self._tap else nullcontext():
            yield

    @contextmanager
    def steps(self) -> Iterator[None]:
        """Apply the changes that Transformers makes for decode steps, and undo them at the end.

        On accelerators, mixtures of experts switch to a kernel that copies the experts' weights for
        each token: fast for a few tokens, but it needs too much memory for a prompt.
        """
        with cast("Any", self.model)._optimize_model_for_decode():
            yield

    def run(self, **inputs: Any) -> Any:
        """Run the model and return its output; features are read only from such runs."""
        with temporary(self._stop_running):  # a later thread may reuse the number
            self._running_thread = threading.get_ident()
            return self.model(**inputs, return_dict=True)

    def _forward(self, tokens: Tensor, **inputs: Any) -> Tensor:
        inputs["inputs_embeds" if tokens.is_floating_point() else "input_ids"] = tokens
        return cast("Tensor", self.run(use_cache=True, **inputs).logits)

    def _is_running(self) -> bool:
        """Return whether this thread runs a forward of this view."""
        return self._running_thread == threading.get_ident()

    def _stop_running(self) -> None:
        self._running_thread = None

    def _take(self, features: Tensor) -> None:
        self.features = features

    def _forget(self) -> None:
        self.features = self._tap = None


def _below_prompt(
    visible: Bool[Tensor, "rows nodes nodes"], num_padding: Int[Tensor, " batch"], length: int
) -> Bool[Tensor, "shapes slots slots"]:
    """Put the causal mask of a prompt of `length` slots before that of a tree."""
    rows, nodes, _ = visible.shape
    shapes = max(rows, len(num_padding))
    full = visible.new_ones(shapes, length + nodes, length + nodes).tril_()
    full[:, length:, length:] = visible
    slots = torch.arange(length + nodes, device=visible.device)
    full &= slots >= num_padding[:, None, None]
    full[:, slots, slots] = True  # a node that sees nothing would turn into NaN
    return full


def _is_band(buffer: Tensor) -> bool:
    """Return whether a buffer is a causal mask whose last slot does not see the first."""
    if buffer.ndim < 2 or buffer.dtype is not torch.bool or buffer.shape[-1] != buffer.shape[-2]:
        return False
    last = buffer.flatten(0, -2)[-1]
    return bool(last[-1]) and not bool(last[0])
