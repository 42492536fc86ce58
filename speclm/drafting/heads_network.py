"""What the draft networks of several methods share: embeddings, output and draft vocabulary."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, Protocol, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from typing_extensions import override

from speclm.drafting.decoder import Rotated, make_rotary
from speclm.drafting.decoder_parts import Fusable, Product, Rotation, joined, signed
from speclm.errors import OptionError

_INIT_STD = 0.02  # that of Llama and Qwen3
_ABSENT = -1e4  # finite, because a processor may ban all tokens that a network can draft
_TABLE_LENGTH = 1024
_BY_LENGTH = ("dynamic", "longrope")
"""Types of rotation that depend on the longest text."""


class HeadsSizes(Rotated, Protocol):
    """What the config of a draft network has to say here."""

    @property
    def hidden_size(self) -> int:
        """Width of its states."""

    @property
    def vocab_size(self) -> int:
        """Width of the target's logits."""

    @property
    def draft_vocab_size(self) -> int:
        """Width of its own logits."""

    @property
    def has_draft_vocab(self) -> bool:
        """Whether it drafts only some of the target's tokens."""

    @property
    def has_own_embeddings(self) -> bool:
        """Whether it has an embedding matrix; else the target's is used."""

    @property
    def has_own_lm_head(self) -> bool:
        """Whether it has an output matrix; else the target's is used."""


class HeadsNetwork(nn.Module, ABC):
    """Base class of draft networks, which hold no decoding state. New ones are zero.

    A subclass adds its parts in `_add_parts`; one of them is `fc`, whose dtype and device are those
    of the network.
    """

    fc: nn.Linear
    embed_tokens: nn.Embedding | None
    lm_head: nn.Linear | None
    draft_columns: Int[Tensor, " draft_vocab"] | None
    """Target token of each column of the logits; None if the vocabularies are equal."""
    form: object = None
    """Stands for the second form of the weights; another object whenever it is made."""
    _is_fused = False
    _input: Product | None = None  # second form of `fc`
    _head: Product | None = None  # and of `lm_head`
    _host_columns: list[int] | None = None
    _table: Float[Tensor, "2 positions head_dim"] | None = None  # cosines and sines
    _table_start = 0

    def __init__(
        self,
        config: HeadsSizes,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> None:
        """Allocate a network of the given sizes."""
        super().__init__()
        self.config = config
        with torch.device("meta"):  # draws no random numbers
            self._add_parts()
        columns = torch.empty(config.draft_vocab_size, dtype=torch.int64, device="meta")
        self.register_buffer("draft_columns", columns if config.has_draft_vocab else None)
        self.rotary = make_rotary(config)
        if dtype is not None:
            self.to(dtype=dtype)
        if device is None or device.type != "meta":
            self.to_empty(device=device or torch.device("cpu"))
            self._clear_()

    @abstractmethod
    def _add_parts(self) -> None:
        """Add embeddings, `fc`, layers and the output, in the order of the state."""

    def _add_embeddings(self) -> None:
        self.embed_tokens = None
        if self.config.has_own_embeddings:
            self.embed_tokens = nn.Embedding(self.config.vocab_size, self.config.hidden_size)

    def _add_output(self) -> None:
        sizes = self.config.hidden_size, self.config.draft_vocab_size
        self.lm_head = nn.Linear(*sizes, bias=False) if self.config.has_own_lm_head else None

    def rotation(self, positions: Int[Tensor, "rows seq"]) -> Rotation:
        """Return the rotation of some positions."""
        return signed(*self.rotary(self.fc.weight, positions))  # it reads the dtype only

    @property
    def rotates_by_length(self) -> bool:
        """Whether rotations depend on the longest text, which is read on the host."""
        return self.config.rope_parameters.get("rope_type") in _BY_LENGTH

    def rotation_from(self, start: int, num: int) -> Rotation:
        """Return the rotation of `num` positions in a row, which all rows share."""
        device, table = self.fc.weight.device, self._table
        end = start + num
        if self.rotates_by_length:
            return self.rotation(torch.arange(start, end, device=device)[None])
        offset = start - self._table_start
        if table is None or offset < 0 or offset + num > table.shape[1]:
            positions = torch.arange(start, end + _TABLE_LENGTH, device=device)
            cosines, sines = self.rotation(positions[None])
            self._table = table = torch.cat((cosines[0], sines[0]))
            self._table_start, offset = start, 0
        cosines, sines = table.narrow(1, offset, num).unbind(0)
        return cosines, sines

    @torch.no_grad()
    def fuse_(self) -> Self:
        """Give the parts a second form of their weights, with fewer calls in decoding.

        Some weights are copied: call it again after changing them; `train` drops the copies. The
        state stays that of the parts.
        """
        self._is_fused, self.form = True, object()
        for part in self.modules():
            if isinstance(part, Fusable):
                part.fuse_()
        self._input = joined(self.fc)
        self._head = None if self.lm_head is None else joined(self.lm_head)
        columns = self.draft_columns
        self._host_columns = None if columns is None or columns.is_meta else columns.tolist()
        return self

    @override
    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        if mode and self._is_fused:  # the copies would not follow the weights
            self._is_fused, self._input, self._head = False, None, None
            self.form = None
            for part in self.modules():
                if isinstance(part, Fusable):
                    part.separate_()
        return self

    @override
    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self._is_fused:
            self.fuse_()
        self._table = None
        # Casting the weights rounds the frequencies too, and `to_empty` loses them.
        device = self.fc.weight.device
        self.rotary = make_rotary(self.config).train(self.training)
        if device.type != "meta":
            self.rotary.to(device)
        return self

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights and of all outputs."""
        return self.fc.weight.dtype

    def embed(
        self, tokens: Int[Tensor, "*rows"], *, embedding: Callable[[Tensor], Tensor]
    ) -> Float[Tensor, "*rows hidden"]:
        """Return the embeddings of the target's tokens.

        Args:
            tokens: Ids of the target.
            embedding: Looks up rows of the target's embedding matrix, as they are stored; called
                if the network has no embeddings of its own.
        """
        return embedding(tokens) if self.embed_tokens is None else self.embed_tokens(tokens)

    def _head_logits(
        self, hidden: Float[Tensor, "*rows hidden"], lm_head: Callable[[Tensor], Tensor]
    ) -> Float[Tensor, "*rows draft_vocab"]:
        """Return logits by the output matrix, or by the target's, `lm_head`, if there is none."""
        if self.lm_head is None:
            return lm_head(hidden)
        if self._head is None:
            return self.lm_head(hidden)  # type: ignore[no-any-return]  # untyped call
        if hidden.ndim == 2:
            return self._head(hidden)
        return self._head(hidden.flatten(0, -2)).view(*hidden.shape[:-1], -1)

    @property
    def host_columns(self) -> list[int] | None:
        """`draft_columns` on the host, read once in the second form of the weights."""
        if self._is_fused or self.draft_columns is None:
            return self._host_columns
        found: list[int] = self.draft_columns.tolist()
        return found

    def target_ids(self, draft_ids: Int[Tensor, "*rows"]) -> Int[Tensor, "*rows"]:
        """Return the target's ids for ids of the draft vocabulary."""
        return draft_ids if self.draft_columns is None else self.draft_columns[draft_ids]

    def spread(
        self, logits: Float[Tensor, "batch nodes draft_vocab"]
    ) -> Float[Tensor, "batch nodes vocab"]:
        """Return logits over the target's tokens; absent ones get almost no probability."""
        if self.draft_columns is None:
            return logits
        shape = (*logits.shape[:2], self.config.vocab_size)
        return logits.new_full(shape, _ABSENT).index_copy_(2, self.draft_columns, logits)

    @torch.no_grad()
    def set_draft_columns_(self, columns: Int[Tensor, " draft_vocab"]) -> None:
        """Choose the target's tokens that can be drafted.

        Raises:
            OptionError: If there is no draft vocabulary or one of another size, or the tokens are
                not increasing ids of the target.
        """
        mine, vocab_size = self.draft_columns, self.config.vocab_size
        if mine is None or columns.shape != mine.shape:
            raise OptionError(
                f"columns are {len(columns)}, expected draft_vocab_size, "
                f"{self.config.draft_vocab_size}, below vocab_size, {vocab_size}; build the heads "
                "with another draft_vocab_size"
            )
        is_increasing = bool((columns[1:] > columns[:-1]).all())
        if not is_increasing or columns[0] < 0 or columns[-1] >= vocab_size:
            raise OptionError(
                f"columns run from {int(columns.min())} to {int(columns.max())}, expected "
                f"increasing ids below {vocab_size}, each once; sort them"
            )
        mine.copy_(columns)
        self._host_columns = mine.tolist()

    @torch.no_grad()
    def init_weights_(
        self,
        *,
        lm_weight: Float[Tensor, "vocab hidden"] | None = None,
        embeddings: Float[Tensor, "vocab hidden"] | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        """Initialise with small random matrices, norms of one, and no biases.

        Args:
            lm_weight: The target's output matrix; one of the network's own gets its rows of the
                draft vocabulary.
            embeddings: The target's embeddings, for a network that has its own.
            generator: Source of the random numbers, on the CPU.
        """
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1 and not self._starts_at_zero(name):
                drawn = torch.empty(parameter.shape, dtype=torch.float32, device="cpu")
                parameter.copy_(drawn.normal_(std=_INIT_STD, generator=generator))
            else:
                parameter.fill_(_constant(name))
        if self.lm_head is not None and lm_weight is not None:
            columns = slice(None) if self.draft_columns is None else self.draft_columns
            self.lm_head.weight.copy_(lm_weight[columns])
        if self.embed_tokens is not None and embeddings is not None:
            self.embed_tokens.weight.copy_(embeddings)

    def _starts_at_zero(self, name: str) -> bool:  # noqa: ARG002 - most have no such matrix
        """Return whether a matrix is zero at the start of training."""
        return False

    @torch.no_grad()
    def _clear_(self) -> None:
        for name, parameter in self.named_parameters():
            parameter.fill_(_constant(name))
        if self.draft_columns is not None:
            self.draft_columns.copy_(
                torch.arange(len(self.draft_columns), device=self.draft_columns.device)
            )


def copy_tensors(
    tensors: Mapping[str, Tensor], *, dtype: torch.dtype, device: torch.device
) -> dict[str, Tensor]:
    """Return copies of the tensors of a file, which may be mapped; integers keep their dtype."""
    return {
        name: tensor.to(device, dtype if tensor.is_floating_point() else tensor.dtype, copy=True)
        for name, tensor in tensors.items()
    }


def _constant(name: str) -> float:
    return 1.0 if "norm" in name else 0.0
