"""MTP layers: each joins the target's hidden state with the embedding of the next token."""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from speclm.attention import TreeStep
from speclm.cache.tree_cache import TreeCache
from speclm.methods.mtp.layer_call import LayerRunner


class MtpLayer(nn.Module):
    """One MTP layer, whose output is the hidden state of the next position.

    Its decoder is a model of the target's own class with a single layer, and the final norm of that
    model is the MTP layer's.

    Source: DeepSeek-AI 2024 (DeepSeek-V3), section 2.2.
    """

    def __init__(
        self, decoder: PreTrainedModel, tensors: Mapping[str, Tensor], *, is_hidden_first: bool
    ) -> None:
        """Take a decoder, and the tensors of all other parts.

        Args:
            decoder: A layer and a norm of the target's classes, which get embeddings only.
            tensors: Weights of the two norms, of the projection, and of matrices that are not the
                target's; see `speclm.methods.mtp.checkpoint`.
            is_hidden_first: Whether hidden states come before embeddings where both are joined.
        """
        super().__init__()
        self.decoder, self.is_hidden_first = decoder, is_hidden_first
        norm: nn.Module = cast("Any", decoder).norm
        self.embedding_norm = _norm_of(norm, tensors["embedding_norm.weight"])
        self.hidden_norm = _norm_of(norm, tensors["hidden_norm.weight"])
        self.projection = _linear_of(tensors["projection.weight"], tensors.get("projection.bias"))
        head, embeddings = tensors.get("head.weight"), tensors.get("embeddings.weight")
        self.lm_head = None if head is None else _linear_of(head, None)
        self.embed_tokens = None if embeddings is None else _embedding_of(embeddings)
        self.runner = LayerRunner(decoder)

    def joined(
        self,
        hidden: Float[Tensor, "batch seq hidden"],
        embeddings: Float[Tensor, "batch seq hidden"],
    ) -> Float[Tensor, "batch seq hidden"]:
        """Return the input of the decoder layer."""
        weight = self.projection.weight
        parts = [
            self.embedding_norm(embeddings.to(weight.device, weight.dtype)),
            self.hidden_norm(hidden.to(weight.device, weight.dtype)),
        ]
        if self.is_hidden_first:
            parts.reverse()
        return self.projection(torch.cat(parts, dim=-1))  # type: ignore[no-any-return]

    def forward(
        self,
        hidden: Float[Tensor, "batch seq hidden"],
        embeddings: Float[Tensor, "batch seq hidden"],
        *,
        visible: Bool[Tensor, "rows seq pending"],
        depths: Int[Tensor, "depth_rows pending"],
        cache: TreeCache,
    ) -> Float[Tensor, "batch seq hidden"]:
        """Run new nodes, which become pending in the cache.

        Args:
            hidden: The target's hidden states, or outputs of an MTP layer, before each node.
            embeddings: Embedding of each node's token.
            visible: True at ``[i, j]`` if new node i sees pending node j; the last are new.
            depths: Depth of each pending node; depth 0 follows the committed tokens.
            cache: Keys and values of this layer.

        Returns:
            Hidden states after the norm, which the output matrix reads.
        """
        num_nodes = hidden.shape[1]
        cache.reserve(num_nodes)
        first = cache.lengths - cache.num_padding
        positions = (first[:, None] + depths[:, -num_nodes:]).clamp(min=0)
        step = TreeStep(visible, depths, cache)
        joined = self.joined(hidden, embeddings)
        states = self.runner.run(joined, positions, step=step, cache=cache)
        cache.append(num_nodes)
        return states


class MtpHeads(nn.Module):
    """The MTP layers of a target: layer k predicts one token further than layer k - 1.

    The input of layer k at a token is the output of layer k - 1 at the token before; that of the
    first layer is the target's hidden state there. Beyond the last layer, it reads its own output.
    """

    def __init__(
        self, layers: Sequence[MtpLayer], *, keys: Sequence[Mapping[str, str]] = ()
    ) -> None:
        """Take the layers.

        Args:
            layers: The layers.
            keys: For each layer the key that each tensor has in the files of the target, by our
                name, to write them there.
        """
        super().__init__()
        self.layers, self.keys = nn.ModuleList(layers), tuple(keys)

    def layer(self, index: int) -> MtpLayer:
        """Return a layer; the last one for any index beyond it."""
        return cast("MtpLayer", self.layers[min(index, len(self.layers) - 1)])

    @property
    def shares_embeddings(self) -> bool:
        """Whether a layer reads the target's embeddings."""
        return any(self.layer(k).embed_tokens is None for k in range(len(self.layers)))

    def embed(
        self, tokens: Int[Tensor, "*rows"], index: int, *, embedding: Callable[[Tensor], Tensor]
    ) -> Float[Tensor, "*rows hidden"]:
        """Return embeddings of tokens for a layer, by the target's if it has none of its own."""
        own = self.layer(index).embed_tokens
        return embedding(tokens) if own is None else own(tokens)

    def logits(
        self,
        hidden: Float[Tensor, "*rows hidden"],
        index: int,
        *,
        lm_head: Callable[[Tensor], Tensor],
    ) -> Float[Tensor, "*rows vocab"]:
        """Return logits for outputs of a layer, by the target's if it has no head of its own."""
        own = self.layer(index).lm_head
        return lm_head(hidden) if own is None else own(hidden)


def _norm_of(like: nn.Module, weight: Tensor) -> nn.Module:
    norm = copy.deepcopy(like)
    cast("Any", norm).weight = nn.Parameter(weight)
    return norm


def _embedding_of(weight: Tensor) -> nn.Embedding:
    embedding = nn.Embedding(weight.shape[0], weight.shape[1], device="meta")
    embedding.weight = nn.Parameter(weight)
    return embedding


def _linear_of(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight)
    if bias is not None:
        linear.bias = nn.Parameter(bias)
    return linear
