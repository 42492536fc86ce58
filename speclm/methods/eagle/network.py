"""EAGLE heads: a small decoder that continues the target's hidden states."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Self, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from typing_extensions import override

from speclm.drafting.decoder_parts import Norm, Rotation
from speclm.drafting.heads_network import HeadsNetwork, copy_tensors
from speclm.methods.eagle.config import EagleConfig
from speclm.methods.eagle.layer import EagleLayer, KeyValueStore

if TYPE_CHECKING:
    from speclm.methods.eagle.checkpoint import EagleCheckpoint


class EagleHeads(HeadsNetwork):
    """The draft network of EAGLE-1, 2 and 3; holds no decoding state.

    The input at a position joins the target's features there with the embedding of the next token.
    The output predicts the features at the next position: `logits` maps it to the token after
    that one, and it is the hidden state of the next call. Layers are Llama's. New heads are zero;
    see `init_weights_`.

    Source: Li et al. 2024 (EAGLE, EAGLE-2), Li et al. 2025 (EAGLE-3).
    """

    config: EagleConfig

    @override
    def _add_parts(self) -> None:
        config, hidden = self.config, self.config.hidden_size
        is_eagle3 = config.kind == "eagle3"
        width = config.num_features * config.target_hidden_size if is_eagle3 else 2 * hidden

        def norm(size: int) -> Norm:
            return Norm(size, eps=config.rms_norm_eps)

        self._add_embeddings()
        sizes = [config.target_hidden_size] * (config.num_features if config.fc_norm else 0)
        self.feature_norms = nn.ModuleList(map(norm, sizes))
        self.feature_norm = norm(width) if config.norm_before_fc else None
        self.fc = nn.Linear(width, hidden, bias=config.fc_bias)
        self.layers = nn.ModuleList(
            EagleLayer(config, index=index) for index in range(config.num_layers)
        )
        self.norm = norm(hidden) if is_eagle3 else None
        self._add_output()

    @override
    def fuse_(self) -> Self:
        super().fuse_()
        for layer in self.layers:
            cast("EagleLayer", layer).fold_()
        return self

    def fuse(self, features: Float[Tensor, "*rows features"]) -> Float[Tensor, "*rows hidden"]:
        """Return the hidden states that replace the target's features as input.

        Args:
            features: For EAGLE-3 the hidden states of the layers read, joined in their order; for
                EAGLE-1 the last one, after the final norm, which is returned as it is.
        """
        features = features.to(self.dtype)
        if self.config.kind == "eagle":
            return features
        if self.feature_norms:
            parts = features.chunk(self.config.num_features, dim=-1)
            normed = [norm(part) for norm, part in zip(self.feature_norms, parts, strict=True)]
            features = torch.cat(normed, dim=-1)
        elif self.feature_norm is not None:
            features = self.feature_norm(features)
        if self._input is None or features.ndim != 2:
            return F.linear(features, self.fc.weight, self.fc.bias)
        return self._input(features)

    def _joined(self, pairs: Float[Tensor, "rows pair"]) -> Float[Tensor, "rows hidden"]:
        """Map embeddings and features to the input of EAGLE-1's first layer."""
        if self._input is None:
            return self.fc(pairs)  # type: ignore[no-any-return]  # a Linear's call is untyped
        return self._input(pairs)

    def forward(
        self,
        hidden: Float[Tensor, "*rows hidden"],
        embeddings: Float[Tensor, "*rows hidden"],
        *,
        position_ids: Int[Tensor, "rows seq"] | None = None,
        rotation: Rotation | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: KeyValueStore | None = None,
        batch: int | None = None,
    ) -> Float[Tensor, "*rows hidden"]:
        """Return the hidden states of the next position.

        Args:
            hidden: Result of `fuse`, or of this method at the previous positions:
                ``[batch, seq, hidden]``, or the same states without the first axis, if `batch` is
                given.
            embeddings: Embeddings of the token after each position, see `embed`.
            position_ids: Positions of the features, not of the tokens; a single row if all rows
                share them.
            rotation: Result of `rotation` for those positions, in place of `position_ids`.
            attention_mask: ``[batch or 1, 1, seq, kv_len]``, added to the scores, or boolean, true
                where a position is seen; each position must see at least one. None if each sees all
                earlier positions within the config's window and there is no padding.
            past_key_values: Cache of keys and values; None to attend to this call only.
            batch: Rows of the batch, if the states of all rows follow one another.
        """
        shape = hidden.shape
        hidden, embeddings = hidden.to(self.dtype), embeddings.to(self.dtype)
        if batch is None:
            batch, hidden, embeddings = shape[0], hidden.flatten(0, 1), embeddings.flatten(0, 1)
        if self.config.kind == "eagle":
            hidden = self._joined(torch.cat((embeddings, hidden), dim=-1))
        if rotation is None:
            assert position_ids is not None, "neither position_ids nor rotation is given"
            rotation = self.rotation(position_ids)
        for layer in self.layers:
            hidden = layer(
                hidden,
                embeddings,
                batch=batch,
                rotation=rotation,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
            )
        if self.config.norm_output and self.norm is not None:
            hidden = self.norm(hidden)
        return hidden if hidden.shape == shape else hidden.view(*shape[:-1], -1)

    def logits(
        self, hidden: Float[Tensor, "*rows hidden"], *, lm_head: Callable[[Tensor], Tensor]
    ) -> Float[Tensor, "*rows draft_vocab"]:
        """Return logits over the draft vocabulary.

        Args:
            hidden: Result of `forward`.
            lm_head: The target's map from hidden states to logits; called if the heads have no
                output matrix of their own.
        """
        if self.norm is not None and not self.config.norm_output:
            hidden = self.norm(hidden)
        logits = self._head_logits(hidden, lm_head)
        scale = self.config.logit_scale
        return logits if scale == 1 else logits * scale


def build_eagle(
    checkpoint: "EagleCheckpoint",
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
) -> EagleHeads:
    """Return the heads of a checkpoint, with copies of its tensors.

    Args:
        checkpoint: Result of `read_eagle`.
        dtype: Dtype of the weights; None for the checkpoint's.
        device: Device of the weights; None for the CPU.
    """
    heads = EagleHeads(checkpoint.config, device=torch.device("meta"))
    target = device or torch.device("cpu")
    state = copy_tensors(checkpoint.tensors, dtype=dtype or checkpoint.dtype, device=target)
    heads.load_state_dict(state, assign=True)
    return heads.to(target)
