"""Decoder layers of EAGLE heads: Llama's, except for the input of the first one."""

from typing import Any, Protocol, cast, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from speclm.drafting.decoder_parts import (
    FixedNorm,
    Fusable,
    GatedMLP,
    Norm,
    Projections,
    Rotation,
)
from speclm.methods.eagle.config import EagleConfig


@runtime_checkable
class KeyValueStore(Protocol):
    """The part of a cache that the heads use; Transformers' caches have it."""

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, /) -> tuple[Tensor, Tensor]:
        """Add the keys and values of a layer's new positions, and return all of them."""
        ...


class EagleAttention(Projections):
    """Grouped attention whose input may be wider than its output."""

    def __init__(self, config: EagleConfig, *, input_size: int, index: int) -> None:
        super().__init__(
            input_size=input_size,
            hidden_size=config.hidden_size,
            head_dim=config.head_dim,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            biases=(config.attention_bias, config.attention_output_bias),
            norm_eps=config.rms_norm_eps if config.has_qk_norm else None,
        )
        self.index = index
        self.is_grouped = config.num_attention_heads != config.num_key_value_heads
        self.sliding_window = config.sliding_window

    def forward(
        self,
        residual: Float[Tensor, "rows hidden"],
        states: Float[Tensor, "rows input"],
        *,
        batch: int,
        rotation: Rotation,
        attention_mask: Tensor | None,
        past_key_values: KeyValueStore | None,
    ) -> Float[Tensor, "rows hidden"]:
        """Return the residual plus what is read at earlier positions and at these."""
        queries, keys, values = self.project(states, rotation, batch=batch)
        if past_key_values is not None:
            keys, values = past_key_values.update(keys, values, self.index)
        seq = queries.shape[2]
        is_simple = attention_mask is None and self.sliding_window is None and seq == keys.shape[2]
        if attention_mask is None and not is_simple:
            attention_mask = self._causal_mask(seq, keys)
        elif attention_mask is not None and attention_mask.is_floating_point():
            attention_mask = attention_mask.to(queries.dtype)
        attended = F.scaled_dot_product_attention(
            queries,
            keys,
            values,
            attn_mask=attention_mask,
            is_causal=is_simple and seq > 1,
            enable_gqa=self.is_grouped,
        )
        return self.add_output(residual, attended)

    def _causal_mask(self, seq: int, keys: Tensor) -> Tensor | None:
        kv_len, window = keys.shape[2], self.sliding_window
        if seq == 1 and (window is None or kv_len <= window):
            return None
        kv_indices = torch.arange(kv_len, device=keys.device)
        distance = kv_indices[kv_len - seq :, None] - kv_indices  # [seq, kv_len]
        sees = distance >= 0
        return sees if window is None else sees & (distance < window)


class EagleLayer(Fusable):
    """One decoder layer.

    The first layer of EAGLE-1 has no norm before attention. The first layer of EAGLE-3 attends to
    embeddings and hidden states, each normed, then concatenated. All others are Llama's.
    """

    _both_norms: FixedNorm | None = None  # of embeddings and hidden states, one after the other

    def __init__(self, config: EagleConfig, *, index: int) -> None:
        super().__init__()
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.is_joining = index == 0 and config.kind == "eagle3"
        self.norm_before_residual = config.norm_before_residual
        self.self_attn = EagleAttention(
            config, input_size=hidden * (1 + self.is_joining), index=index
        )
        self.mlp = GatedMLP(
            hidden_size=hidden, inner_size=config.intermediate_size, activation=config.hidden_act
        )
        self.post_attention_layernorm = Norm(hidden, eps=eps)
        self.input_layernorm = Norm(hidden, eps=eps) if index or self.is_joining else None
        self.hidden_norm = Norm(hidden, eps=eps) if self.is_joining else None

    @override
    def fuse_(self) -> None:
        if self.input_layernorm is not None and self.hidden_norm is not None:
            weights = self.input_layernorm.weight, self.hidden_norm.weight
            eps = cast("float", self.hidden_norm.eps)
            norms = FixedNorm(torch.stack(weights).detach(), eps)
            self._both_norms = norms if norms.is_for_cpu else None

    @override
    def separate_(self) -> None:
        self._both_norms = None

    def fold_(self) -> None:
        """Move weights of norms into the maps that read their results, where that saves calls.

        To be called once all parts have their second form.
        """
        factors = self.post_attention_layernorm.fold_()
        if factors is not None:
            self.mlp.scale_input_(factors)
        factors = None
        if self._both_norms is not None and not self.norm_before_residual:
            factors = self._both_norms.fold_()
        elif self.input_layernorm is not None and not self.is_joining:
            factors = self.input_layernorm.fold_()
        if factors is not None:
            self.self_attn.scale_input_(factors.flatten())

    def forward(
        self,
        hidden: Float[Tensor, "rows hidden"],
        embeddings: Float[Tensor, "rows hidden"],
        **attention: Any,
    ) -> Float[Tensor, "rows hidden"]:
        """Run the layer; only the first layer of EAGLE-3 reads the embeddings."""
        states = residual = hidden
        if self._both_norms is not None and not self.norm_before_residual:
            both = self._both_norms(torch.stack((embeddings, hidden), dim=1))
            states = both.view(len(both), -1)
        elif self.input_layernorm is not None and self.hidden_norm is not None:
            states = self.hidden_norm(hidden)
            residual = states if self.norm_before_residual else hidden
            states = torch.cat((self.input_layernorm(embeddings), states), dim=-1)
        elif self.input_layernorm is not None:
            states = self.input_layernorm(hidden)
        hidden = self.self_attn(residual, states, **attention)
        return self.mlp(hidden, self.post_attention_layernorm(hidden))  # type: ignore[no-any-return]
