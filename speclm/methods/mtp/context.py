"""What MTP layers have computed at committed tokens, from which drafts start."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from speclm.acceptance import Accepted
from speclm.cache.tree_cache import TreeCache
from speclm.devices import upload
from speclm.drafting.committed import CommittedRounds
from speclm.drafting.interface import Prefill
from speclm.drafting.levels import seen_below
from speclm.methods.mtp.network import MtpHeads
from speclm.target import TargetView, embedding_map, logits_map


class MtpContext:
    """Keeps keys, values and last outputs of every layer at the committed tokens.

    All caches hold the same tokens, without the first one of a text. Layer k has no input at the
    first k of them, which count as padding.
    """

    def __init__(self, heads: MtpHeads, view: TargetView) -> None:
        """Create a context for any number of generations."""
        self._heads, self._view = heads, view
        self._prompt: Prefill | None = None  # until it is read
        self._rounds = CommittedRounds()
        self.caches: list[TreeCache] = []
        self.outputs: list[Float[Tensor, "batch hidden"]] = []
        """Output of each layer at the roots."""
        self._embedding: Callable[[Tensor], Tensor] | None = None  # for one draft
        self._num_unsure = 0  # first entries that are padding of some row and layer

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_embedding": None}  # of another object

    def begin(self, prompt: Prefill) -> None:
        """Start a generation; its prompt is read by the first draft."""
        self._prompt, self._rounds = prompt, CommittedRounds()
        self.caches, self.outputs = [], []

    def commit(self, accepted: Accepted) -> None:
        """Drop the nodes of the draft, and keep what was committed for the next one."""
        for cache in self.caches:
            cache.keep([[] for _ in accepted.emitted])
        self._rounds.add(accepted)

    def catch_up(self, *, num_ranks: int | None = None) -> None:  # noqa: ARG002 - no stages
        """Run the layers over what was committed since the last draft."""
        if self._heads.shares_embeddings:
            self._embedding = embedding_map(self._view.model)
        if not self.caches:
            assert self._prompt is not None, "propose before begin"
            self._read_prompt(self._prompt)
            self._prompt = None
        new = self._rounds.take()
        if new is None:
            return
        outputs, hidden = [], new.features
        for index, cache in enumerate(self.caches):
            states = self._read(index, new.tokens, hidden)
            cache.keep([range(count) for count in new.counts])
            before = self.outputs[index] if self.outputs else torch.zeros_like(states[:, 0])
            outputs.append(new.newest(states, before))
            hidden = torch.cat([before[:, None], states[:, :-1]], dim=1)
        self.outputs = outputs

    def start(
        self,
        widths: list[int],
        *,
        width: int = 0,  # noqa: ARG002 - levels are not padded
        num_ranks: int | None = None,  # noqa: ARG002
    ) -> "MtpRun":
        """Return a run of the layers from the roots; see `LevelContext.start`."""
        for cache in self.caches:
            cache.reserve(sum(widths))
        return MtpRun(self, self._heads, logits_map(self._view.model))

    def run(
        self,
        index: int,
        tokens: Int[Tensor, "batch nodes"],
        hidden: Float[Tensor, "batch nodes hidden"],
        visible: Bool[Tensor, "rows nodes pending"],
        depths: Int[Tensor, "1 pending"],
    ) -> Float[Tensor, "batch nodes hidden"]:
        """Run a layer over new nodes, which become pending.

        Args:
            index: The layer.
            tokens: Tokens of the nodes.
            hidden: Its input at each node next to the token.
            visible: Pending nodes that each new one sees; the last ones are the new ones.
            depths: Depths of the pending nodes.
        """
        embeddings = self._heads.embed(
            tokens, index, embedding=self._embedding or self._view.stored_embeddings
        )
        found: Tensor = self._heads.layer(index)(
            hidden,
            embeddings,
            visible=visible,
            depths=depths,
            cache=self.caches[index],
        )
        return found

    def _read_prompt(self, prompt: Prefill) -> None:
        """Run the layers over the prompt's features, each joined with the token after it."""
        features = prompt.features
        assert features is not None
        following = torch.cat([prompt.tokens[:, 1:], prompt.first_tokens[:, None]], dim=1)
        length = features.shape[1]  # only the last positions if a cache held the first ones
        padding = (prompt.num_padding - (prompt.tokens.shape[1] - length)).clamp(min=0)
        num_layers = len(self._heads.layers)
        self.caches = [
            TreeCache(num_layers=1, num_padding=padding + index) for index in range(num_layers)
        ]
        self._num_unsure = int(padding.max()) + num_layers - 1  # once a generation
        hidden, tokens = features, following[:, -length:]
        for index, cache in enumerate(self.caches if length else []):
            states = self._read(index, tokens, hidden)
            cache.keep([range(length)] * len(padding))
            self.outputs.append(states[:, -1])
            hidden = torch.cat([torch.zeros_like(states[:, :1]), states[:, :-1]], dim=1)

    def _read(
        self,
        index: int,
        tokens: Int[Tensor, "batch new"],
        hidden: Float[Tensor, "batch new hidden"],
    ) -> Float[Tensor, "batch new hidden"]:
        """Run a layer over consecutive tokens, which become pending; zero where it has no input."""
        cache, num_new = self.caches[index], tokens.shape[1]
        new = torch.arange(num_new, device=tokens.device)
        visible = (new[:, None] >= new)[None]
        if min(cache.host_lengths) >= self._num_unsure:
            return self.run(index, tokens, hidden, visible, new[None])
        is_known = cache.lengths[:, None] + new >= cache.num_padding[:, None]
        visible = visible & is_known[:, None] | torch.eye(
            num_new, dtype=torch.bool, device=new.device
        )
        states = self.run(index, tokens, hidden, visible, new[None])
        return states * is_known[:, :, None]


class MtpRun:
    """Runs the layers over the levels of a draft, one after another.

    A node of depth d gets outputs of the layers from d on, or of the last one, because that is what
    tokens below it are predicted from.
    """

    def __init__(
        self, context: MtpContext, heads: MtpHeads, lm_head: Callable[[Tensor], Tensor]
    ) -> None:
        """Start at the roots; `lm_head` is the target's map to logits."""
        self._context, self._heads, self._lm_head = context, heads, lm_head
        self._depth = 0
        self._depths: list[int] = []  # of all pending nodes
        self._outputs = [output[:, None] for output in context.outputs]
        batch, device = len(self._outputs[0]), self._outputs[0].device
        self._seen = torch.ones(batch, 1, 0, dtype=torch.bool, device=device)

    @property
    def logits(self) -> Float[Tensor, "batch width vocab"]:
        """Logits after every node of the last level, computed anew."""
        index = min(self._depth, len(self._outputs) - 1)
        return self._heads.logits(self._outputs[index], index, lm_head=self._lm_head)

    def best(self, num: int) -> tuple[Tensor, Tensor]:
        """Return log-probabilities and columns of the best children, ``[batch, width, num]``."""
        found = self.logits.float().log_softmax(-1).topk(num, dim=-1)
        return found.values, found.indices

    def below(
        self, tokens: Int[Tensor, "batch width"], parents: Int[Tensor, "batch width"]
    ) -> None:
        """Feed the next level, whose nodes become pending.

        Args:
            tokens: The target's tokens.
            parents: Index of each token's parent in the last level.
        """
        last = len(self._outputs) - 1
        self._depths += [self._depth] * tokens.shape[1]
        self._depth += 1
        self._seen = seen_below(self._seen, parents)
        depths = upload([self._depths], tokens.device)
        for index in range(last, min(self._depth, last) - 1, -1):
            above = self._outputs[index if self._depth > index else index - 1]
            hidden = above.gather(1, parents[:, :, None].expand(-1, -1, above.shape[2]))
            self._outputs[index] = self._context.run(index, tokens, hidden, self._seen, depths)
