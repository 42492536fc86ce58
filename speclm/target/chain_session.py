"""Verify chains, fed as in regular generation, if the target cannot verify trees."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache
from typing_extensions import override

from speclm.cache import Rewind, cache_name, restore, snapshot
from speclm.errors import UnsupportedModelError
from speclm.target.session import Session
from speclm.target.view import TargetView
from speclm.tree.topology import TreeTopology

MAX_UNREAD = 16
"""Maximum committed tokens that a recurrent model reads again along with the next ones. Beyond it,
a round without a draft catches up. So few cost little compared with the fixed cost of a forward."""


class ChainReader:
    """Feed a model one chain of tokens per row, and undo tokens that are not kept.

    All rows are equally long, padding included. The model gets the inputs of regular generation,
    from its own `prepare_inputs_for_generation` and with Transformers' cache, but several tokens
    at a time. A recurrent state cannot drop only its last tokens, so it is restored, and the kept
    tokens become unread. They are fed again before the next ones.
    """

    def __init__(
        self,
        target: TargetView,
        inputs: dict[str, Any],
        *,
        images: Mapping[str, Any] | None = None,
    ) -> None:
        """Start a generation.

        Args:
            target: The model.
            inputs: Model inputs that `generate` has resolved, cache included.
            images: Further inputs, only for the prompt.

        Raises:
            UnsupportedModelError: If the inputs hold no `DynamicCache`.
        """
        self._target = target
        self._inputs, self._images = inputs, images or {}
        caches = [value for value in inputs.values() if isinstance(value, Cache)]
        if [type(cache) for cache in caches] != [DynamicCache]:
            found = ", ".join(type(cache).__name__ for cache in caches) or "none"
            raise UnsupportedModelError(
                f"{target.name} decodes with a cache of type {found}, chains need one DynamicCache"
            )
        self.cache = caches[0]
        self._rewind: Rewind | None = None
        self._num_read = self._num_prompt = 0
        self._num_unread = 0
        self._fed: Tensor | None = None  # since the last keep, unread tokens first
        self._unread: Tensor | None = None

    @classmethod
    def of_prompt(cls, target: TargetView, attention_mask: Tensor) -> "ChainReader":
        """Start without `generate`, for a prompt with the given mask ``[batch, seq]``."""
        return cls(target, prompt_inputs(target, attention_mask))

    @property
    def num_unread(self) -> int:
        """Committed tokens that are fed again before the next ones."""
        return 0 if self._unread is None else self._unread.shape[1]

    def prefill(
        self,
        tokens: Int[Tensor, "batch seq"] | Float[Tensor, "batch seq hidden"],
        *,
        num_cached: int = 0,
    ) -> Float[Tensor, "batch 1 vocab"]:
        """Read a prompt, or the part that is not cached, and commit it.

        Args:
            tokens: The prompts, or their embeddings.
            num_cached: Slots that the cache holds.

        Returns:
            Logits after the last token.
        """
        ids, inputs = tokens, {**self._inputs, **self._images}
        if tokens.is_floating_point():
            ids = torch.zeros(len(tokens), 0, dtype=torch.long, device=tokens.device)
            inputs["inputs_embeds"] = tokens
        logits = self._run(ids, inputs, is_first=True, num_logits=1)
        self._num_read = self._num_prompt = num_cached + tokens.shape[1]
        self._rewind = Rewind(self.cache)
        return logits

    def feed(self, tokens: Int[Tensor, "batch new"]) -> Float[Tensor, "batch new vocab"]:
        """Read the tokens that come next; they are pending until `keep`.

        Returns:
            Logits after each of them.
        """
        assert self._rewind is not None, "feed before prefill"
        fed = tokens
        if self._fed is None:
            self._rewind.mark()
            if self._unread is not None:
                fed = torch.cat([self._unread, tokens], dim=1)
            self._num_unread, self._unread, self._fed = self.num_unread, None, fed
        else:
            self._rewind.narrow()
            self._fed = torch.cat([self._fed, tokens], dim=1)
        return self._run(fed, self._inputs_for(self._fed.shape[1]), num_logits=tokens.shape[1])

    def keep(self, num_tokens: int) -> None:
        """Commit the first pending tokens of every row and drop the others."""
        if self._fed is None:
            return
        assert self._rewind is not None
        num_kept, num_fed = self._num_unread + num_tokens, self._fed.shape[1]
        if num_kept == num_fed or self._rewind.is_croppable:
            if self._rewind.is_croppable:
                self._rewind.drop(num_fed - num_kept)
            self._num_read += num_kept
        else:
            self._rewind.restore()
            self._unread = self._fed[:, :num_kept] if num_kept else None
        self._fed = None

    def settle(self) -> None:
        """Read unread tokens, and leave the cache as in regular generation; nothing is pending."""
        assert self._fed is None
        if self._unread is not None:
            self._run(self._unread, self._inputs_for(self.num_unread), num_logits=1)
            self._num_read += self.num_unread
            self._unread = None
        if self._rewind is not None:
            self._rewind.release()

    def _inputs_for(self, num_new: int) -> dict[str, Any]:
        """Return the inputs of the prompt, extended to `num_new` slots after those read."""
        inputs, length = dict(self._inputs), self._num_read + num_new
        mask, positions = inputs.get("attention_mask"), inputs.get("position_ids")
        if mask is not None:
            ones = mask.new_ones(len(mask), length - mask.shape[1])
            inputs["attention_mask"] = torch.cat([mask, ones], dim=1)
        if positions is not None:
            num_after = length - self._num_prompt
            steps = torch.arange(1, num_after + 1, device=positions.device)
            inputs["position_ids"] = torch.cat([positions, positions[..., -1:] + steps], dim=-1)
        return inputs

    def _run(
        self, tokens: Tensor, inputs: dict[str, Any], *, num_logits: int, is_first: bool = False
    ) -> Tensor:
        model = cast("Any", self._target.model)
        resolved = model.prepare_inputs_for_generation(
            tokens, is_first_iteration=is_first, **inputs
        )
        if "logits_to_keep" in resolved:
            resolved["logits_to_keep"] = num_logits
        logits: Tensor = self._target.run(**resolved).logits
        return logits[:, -num_logits:]


def prompt_inputs(target: TargetView, attention_mask: Tensor) -> dict[str, Any]:
    """Return the inputs that `generate` resolves for a prompt with the mask ``[batch, seq]``."""
    model = cast("Any", target.model)
    accepted = inspect.signature(model.forward).parameters
    inputs: dict[str, Any] = {"use_cache": True}
    if not bool(attention_mask.all()):
        inputs["attention_mask"] = attention_mask
    if "position_ids" in accepted:
        inputs["position_ids"] = (attention_mask.long().cumsum(1) - 1).clamp(min=0)
    if "logits_to_keep" in accepted:
        inputs["logits_to_keep"] = 1
    if model._supports_default_dynamic_cache():
        inputs[cache_name(model)] = DynamicCache(config=model.config.get_text_config(decoder=True))
    return inputs


class ChainSession(Session):
    """Verify one chain per row; all rows advance together."""

    needs_lockstep = True

    def __init__(
        self,
        target: TargetView,
        inputs: dict[str, Any],
        *,
        images: Mapping[str, Any] | None = None,
        num_cached: int,
        is_callers: bool,
    ) -> None:
        """Start a generation.

        Args:
            target: The model.
            inputs: Model inputs that `generate` has resolved, cache included.
            images: Further inputs, only for the prompt.
            num_cached: Slots that the cache holds.
            is_callers: Whether the cache is the caller's, and restored after an error.

        Raises:
            UnsupportedModelError: If the inputs hold no `DynamicCache`.
        """
        self._reader = ChainReader(target, inputs, images=images)
        self._num_cached = num_cached
        self._before = snapshot(self._reader.cache) if is_callers else None

    @property
    @override
    def num_cached(self) -> int:
        return self._num_cached

    @property
    @override
    def merges_prompt(self) -> bool:
        return False

    @property
    @override
    def is_behind(self) -> bool:
        return self._reader.num_unread > MAX_UNREAD

    @override
    def prefill(
        self, tokens: Int[Tensor, "batch seq"] | Float[Tensor, "batch seq hidden"]
    ) -> Float[Tensor, "batch 1 vocab"]:
        return self._reader.prefill(tokens, num_cached=self._num_cached)

    @override
    def verify(
        self,
        tokens: Int[Tensor, "batch nodes"],
        topology: TreeTopology,
        *,
        prompt: Int[Tensor, "batch seq"] | None = None,
        max_length: int | None = None,
    ) -> Float[Tensor, "batch nodes vocab"]:
        assert prompt is None, "chains read the prompt separately"
        return self._reader.feed(tokens)

    @override
    def keep(
        self,
        paths: Sequence[Sequence[int]],
        *,
        device_paths: Int[Tensor, "batch path"] | None = None,
    ) -> None:
        assert len({len(path) for path in paths}) == 1, "rows of a chain advance together"
        self._reader.keep(len(paths[0]))

    @override
    def hand_over(self, into: DynamicCache, sequences: Int[Tensor, "batch length"]) -> None:
        assert into is self._reader.cache
        self._reader.settle()

    @override
    def abandon(self) -> None:
        if self._before is not None:
            restore(self._reader.cache, self._before)
