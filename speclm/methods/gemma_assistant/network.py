"""Run Transformers' Gemma 4 assistants over the nodes of a draft."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from speclm.attention import attached, attention_configs, tree_step
from speclm.cache.tree_cache import TreeCache

FULL, SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True, slots=True, eq=False)
class TargetStates:
    """What the layers of an assistant read of the target in one round.

    Args:
        states: Keys and values of the committed positions by layer type,
            ``[batch, kv_heads, kv_len, head_dim]``; sliding layers have only the last ones.
        biases: What is added to the scores, by layer type, ``[batch, 1, 1, kv_len]``.
        positions: Position of each row's root, which is that of all its nodes.
    """

    states: Mapping[str, tuple[Tensor, Tensor]]
    biases: Mapping[str, Tensor]
    positions: Int[Tensor, " batch"]


class _Step:
    """Makes attention compute with the masks that it is given, over keys that heads share."""

    is_regular = False

    def __init__(self) -> None:
        self.windows: set[int | None] = set()

    def lazy_bias(self, window: int | None, dtype: torch.dtype, /) -> Tensor | None:  # noqa: ARG002
        """Return None: the assistant is given its masks, and asks for none."""
        return None

    def kernel_mask(self, device: torch.device, /) -> Any:
        """Refuse: only masks that a step made go to kernels."""
        raise NotImplementedError

    def repeated(self, bias: Tensor, groups: int, /) -> Tensor:
        """Return a mask repeated along its nodes."""
        return bias.repeat(1, 1, groups, 1)


class AssistantNetwork:
    """Runs an assistant; holds no decoding state.

    A node's input joins the target's embedding of its token with the hidden state that the
    assistant returned for its parent, which for the root is the target's own. Its layers have
    queries only. They read the keys and values of the target's last layer of their type that has
    some, so nodes neither see each other nor have positions of their own.
    """

    def __init__(self, model: PreTrainedModel, *, layers: Mapping[str, int]) -> None:
        """Wrap a loaded assistant.

        Args:
            model: A Gemma 4 assistant of Transformers.
            layers: The target's layer that the layers of each type read.
        """
        self.model, self._layers = cast("Any", model), layers
        self._configs = attention_configs(model)
        self._window = int(model.config.get_text_config().sliding_window)

    @property
    def weight(self) -> Float[Tensor, "hidden two_target_hidden"]:
        """A weight, whose dtype and device are those of the assistant's inputs."""
        return cast("Tensor", self.model.pre_projection.weight)

    def read(self, cache: TreeCache) -> TargetStates:
        """Return what the assistant reads of a cache, whose committed tokens end before the roots.

        Like Transformers, a sliding layer sees the last ``sliding_window + 1`` of them.
        """
        like, lengths = self.weight, cache.lengths
        positions = lengths - cache.num_padding
        if cache.position_shift is not None:
            positions = positions + cache.position_shift.reshape(-1, len(lengths))[0]
        states: dict[str, tuple[Tensor, Tensor]] = {}
        biases: dict[str, Tensor] = {}
        for kind, index in self._layers.items():
            starts, first = cache.num_padding, 0
            if kind == SLIDING:
                starts = torch.maximum(starts, lengths - 1 - self._window)
                first = max(min(cache.host_lengths) - 1 - self._window, 0)
            layer: Any = cache.layers[index]
            num = cache.tree_start - first
            states[kind] = (
                layer.keys.narrow(2, first, num).to(like.device, like.dtype),
                layer.values.narrow(2, first, num).to(like.device, like.dtype),
            )
            slots = torch.arange(first, first + num, device=lengths.device)
            is_hidden = (slots < starts[:, None]) | (slots >= lengths[:, None])
            bias = torch.zeros(is_hidden.shape, dtype=like.dtype, device=lengths.device)
            bias.masked_fill_(is_hidden, torch.finfo(like.dtype).min)
            biases[kind] = bias[:, None, None].to(like.device)
        return TargetStates(states, biases, positions.to(like.device))

    def forward(
        self,
        embeddings: Float[Tensor, "batch nodes target_hidden"],
        hidden: Float[Tensor, "batch nodes target_hidden"],
        seen: TargetStates,
    ) -> tuple[Float[Tensor, "batch nodes target_hidden"], Float[Tensor, "batch nodes hidden"]]:
        """Run some nodes.

        Args:
            embeddings: The target's embeddings of their tokens, as its first layer reads them.
            hidden: Hidden states of their parents.
            seen: Result of `read`.

        Returns:
            The hidden states for their children, and those that `logits` reads.
        """
        model, like, width = self.model, self.weight, embeddings.shape[1]
        pairs = torch.cat([embeddings.to(like.device), hidden.to(like.device)], dim=-1)
        with attached(self._configs), tree_step(_Step()):
            own = model.model(
                inputs_embeds=model.pre_projection(pairs.to(like.dtype)),
                attention_mask={
                    kind: bias.expand(-1, -1, width, -1) for kind, bias in seen.biases.items()
                },
                position_ids=seen.positions[:, None].expand(-1, width),
                shared_kv_states=dict(seen.states),
                use_cache=False,
                # With a number, Transformers drops nodes if there are no embeddings for each layer.
                logits_to_keep=None,
            ).last_hidden_state
        return model.post_projection(own), own

    def logits(
        self, hidden: Float[Tensor, "batch nodes hidden"]
    ) -> Float[Tensor, "batch nodes vocab"]:
        """Return logits; minus infinity at tokens outside the clusters that a node looks into."""
        model = self.model
        head: nn.Module | None = model.masked_embedding
        if head is None:
            return cast("Tensor", model.lm_head(hidden))
        return clustered_logits(hidden, head, weight=model.lm_head.weight)


def clustered_logits(
    hidden: Float[Tensor, "batch nodes hidden"],
    head: nn.Module,
    *,
    weight: Float[Tensor, "vocab hidden"],
) -> Float[Tensor, "batch nodes vocab"]:
    """Return the logits of the tokens in the clusters nearest to each node.

    Transformers gives the other tokens one less than the lowest logit of the whole batch, which
    waits for the device and depends on the other rows; here they have minus infinity.

    Args:
        hidden: Output of the last layer.
        head: Module with a centroid of each cluster, and the tokens in the order of clusters.
        weight: Output matrix.
    """
    parts = cast("Any", head)
    clusters = parts.token_ordering.view(parts.num_centroids, -1)  # [clusters, size]
    flat = hidden.flatten(0, 1)
    nearest = parts.centroids(flat).topk(parts.centroid_intermediate_top_k, dim=-1).indices
    tokens = clusters[nearest].flatten(1)  # [rows, candidates]
    found = (weight[tokens] @ flat[:, :, None]).squeeze(2)
    logits = found.new_full((len(flat), len(weight)), -torch.inf)
    return logits.scatter_(1, tokens, found).view(*hidden.shape[:2], -1)


class AssistantRun:
    """Runs an assistant over the levels of a draft, one after another."""

    def __init__(
        self,
        network: AssistantNetwork,
        embed: nn.Module,
        seen: TargetStates,
        *,
        roots: Int[Tensor, " batch"],
        hidden: Float[Tensor, "batch target_hidden"],
    ) -> None:
        """Start at the roots.

        Args:
            network: The assistant.
            embed: The target's embeddings, with the factor of its own.
            seen: What it reads of the target.
            roots: Token of each root.
            hidden: The target's hidden state that each root was chosen from.
        """
        self._network, self._embed, self._seen = network, embed, seen
        self._hidden: Float[Tensor, "batch nodes target_hidden"] = hidden[:, None]
        self._own: Float[Tensor, "batch nodes hidden"] | None = None
        self._roots = roots

    @property
    def logits(self) -> Float[Tensor, "batch nodes vocab"]:
        """Logits after every node of the last level, computed anew; at first, after the roots."""
        if self._own is None:
            self.below(self._roots[:, None], torch.zeros_like(self._roots)[:, None])
        assert self._own is not None
        return self._network.logits(self._own).to(self._roots.device)

    def best(self, num: int) -> tuple[Tensor, Tensor]:
        """Return log-probabilities and tokens of the best children, ``[batch, nodes, num]``."""
        found = self.logits.float().log_softmax(-1).topk(num, dim=-1)
        return found.values, found.indices

    def below(
        self, tokens: Int[Tensor, "batch nodes"], parents: Int[Tensor, "batch nodes"]
    ) -> None:
        """Run the next level.

        Args:
            tokens: Its tokens.
            parents: Index of each token's parent in the last level.
        """
        above = self._hidden
        if tokens.shape[1] > 1 or above.shape[1] > 1:
            indices = parents.to(above.device)[:, :, None].expand(-1, -1, above.shape[2])
            above = above.gather(1, indices)
        self._hidden, self._own = self._network.forward(self._embed(tokens), above, self._seen)
