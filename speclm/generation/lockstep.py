"""Decides positions one by one for all rows in lockstep, as regular generation does.

Logits processors that read the text, stopping criteria and streamers may keep state, look at other
rows, count their calls or draw random numbers. They receive the tensors that regular generation
gives them, in the same order, once per position.
"""

from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from speclm.acceptance import Accepted
from speclm.drafting.interface import Draft
from speclm.errors import NumericalError, OptionError
from speclm.generation.request import Request
from speclm.generation.sequences import FollowsRounds, Sequences
from speclm.sampling.chooser import pick
from speclm.sampling.noise import PositionNoise, as_if_drawn


class Lockstep:
    """Advances all rows of a batch together, and calls processors, criteria and the streamer.

    Ended rows continue with padding tokens, which the target reads as in regular generation, so
    their logits and cache entries are the same too. If no criterion names an end-of-sequence
    token, Transformers lets every row run until all have been stopped once, and so does this class.

    Attributes:
        ids: Prompt and tokens so far, ``[batch, length]``; padding in ended rows.
        scores: Processed scores of every position, if requested.
        logits: The target's logits of every position in float32, if requested.
        pad_token_id: Token of ended rows.
    """

    def __init__(
        self,
        request: Request,
        sequences: Sequences,
        streamer: BaseStreamer | None,
        *,
        target_name: str,
    ) -> None:
        """Start after the prompt, which the streamer receives."""
        self.ids: Int[Tensor, "batch length"] = request.prompt.input_ids
        keeps_scores, keeps_logits = request.keeps_scores, request.keeps_logits
        self.scores: tuple[Float[Tensor, "batch vocab"], ...] | None = () if keeps_scores else None
        self.logits: tuple[Float[Tensor, "batch vocab"], ...] | None = () if keeps_logits else None
        self.pad_token_id = request.pad_token_id
        self._sequences = sequences
        self._processors = request.processors
        self._criteria = request.criteria
        self._streamer = streamer
        self._target_name = target_name
        self._ends_rows_apart = request.names_eos
        self._was_stopped = [False] * len(self.ids)
        if streamer is not None:
            streamer.put(self.ids.cpu())  # type: ignore[no-untyped-call]  # Transformers'

    def advance(
        self,
        logits: Float[Tensor, "batch vocab"],
        noise: PositionNoise | None,
        *,
        depth: int,
        chosen: list[int] | None = None,
    ) -> list[int]:
        """Decide the next position of every row, and call criteria and streamer.

        Args:
            logits: The target's logits at that position.
            noise: Noise of the positions; None when it decides nothing.
            depth: Positions decided since `noise.seek`.
            chosen: Tokens that an acceptance rule has decided on; None to choose here.

        Returns:
            The tokens, padding in ended rows.

        Raises:
            OptionError: If the processors return anything but one row of scores for each row.
            NumericalError: If scores of a live row have no largest number.
        """
        step = self._sequences.num_steps
        raw = logits.to(copy=True, dtype=torch.float32)
        with as_if_drawn(noise, step):
            scores: Tensor = cast("Any", self._processors)(self.ids, raw)
        self._require_rows(scores)
        if self.scores is not None:
            self.scores = (*self.scores, scores)
        if self.logits is not None:
            self.logits = (*self.logits, raw)
        if chosen is None:
            # Syncs at every position: criteria and streamers are host code.
            if noise is not None:
                noise.match(scores, step)
            chosen = pick(scores, None if noise is None else noise.at_depth(depth)).tolist()
            self._require_numbers(chosen, raw, logits.dtype)
        is_live = self._sequences.is_live
        tokens = [
            token if live else self.pad_token_id
            for token, live in zip(chosen, is_live, strict=True)
        ]
        column = torch.tensor(tokens, device=self.ids.device, dtype=torch.long)
        self.ids = torch.cat([self.ids, column[:, None]], dim=1)
        self._sequences.append(tokens)
        with as_if_drawn(noise, step + 1):
            flags = self._criteria(self.ids, self.scores)
            self._end_rows(flags.tolist())
            if self._streamer is not None:
                self._streamer.put(column.cpu())  # type: ignore[no-untyped-call]  # Transformers'
        return tokens

    def follow(
        self,
        draft: Draft,
        logits: Float[Tensor, "batch nodes vocab"],
        noise: PositionNoise | None,
        *,
        decided: list[list[int]] | None,
    ) -> tuple[Accepted, list[list[int]]]:
        """Decide position by position for all rows, as far as all of them follow a draft.

        Args:
            draft: The verified draft.
            logits: The target's logits after every node.
            noise: Noise of the positions; None when it decides nothing.
            decided: Tokens of each row that an acceptance rule has decided on; None to choose here.

        Returns:
            Tokens of the live rows, and the nodes to keep in all rows, including ended ones.
        """
        batch = torch.arange(len(logits), device=logits.device)
        tokens, parents = draft.tokens.tolist(), draft.topology.host_parents
        nodes = [0] * len(tokens)
        kept: list[list[int]] = [[] for _ in tokens]
        paths: list[list[int]] = [[] for _ in tokens]
        emitted: list[list[int]] = [[] for _ in tokens]
        for depth in range(draft.topology.max_depth + 1):
            was_live = self._sequences.is_live
            at_nodes = torch.tensor(nodes, device=logits.device, dtype=torch.long)
            column = self.advance(
                logits[batch, at_nodes],
                noise,
                depth=depth,
                chosen=None if decided is None else [_at(row, depth) for row in decided],
            )
            for row, (node, token) in enumerate(zip(nodes, column, strict=True)):
                kept[row].append(node)
                if was_live[row]:
                    paths[row].append(node)
                    emitted[row].append(token)
            children = [
                _child(parents[row if len(parents) > 1 else 0], tokens[row], node, token)
                for row, (node, token) in enumerate(zip(nodes, column, strict=True))
            ]
            is_decided = decided is None or all(
                len(row) > depth + 1
                for row, live in zip(decided, self._sequences.is_live, strict=True)
                if live
            )
            if None in children or not is_decided or not self._sequences.any_live:
                break
            nodes = [child for child in children if child is not None]
        follower: object = self._streamer
        if isinstance(follower, FollowsRounds):
            follower.on_round(len(kept[0]) - 1)
        return Accepted.from_host(paths, emitted, device=logits.device), kept

    def _end_rows(self, stopped: list[bool]) -> None:
        self._was_stopped = [
            before or now for before, now in zip(self._was_stopped, stopped, strict=True)
        ]
        if self._ends_rows_apart or all(self._was_stopped):
            self._sequences.end(self._was_stopped)

    def _require_rows(self, scores: object) -> None:
        if isinstance(scores, Tensor) and scores.dim() == 2 and len(scores) == len(self.ids):
            return
        names = ", ".join(type(processor).__name__ for processor in self._processors)
        found = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise OptionError(
            f"logits processors ({names}) returned {found}, expected scores of shape "
            f"[{len(self.ids)}, vocab]; check the processors passed in"
        )

    def _require_numbers(
        self, chosen: list[int], raw: Float[Tensor, "batch vocab"], dtype: torch.dtype
    ) -> None:
        bad = [
            row
            for row, (token, live) in enumerate(zip(chosen, self._sequences.is_live, strict=True))
            if live and token < 0
        ]
        if not bad:
            return
        if bool(raw[bad].isnan().any()):
            raise nan_logits(self._target_name, dtype)
        names = ", ".join(type(processor).__name__ for processor in self._processors)
        raise NumericalError(
            f"scores of row {bad[0]} have no largest number after the logits processors ({names}), "
            "though the target's logits have one; check the processors passed in, and that they "
            "leave at least one token in every row"
        )


def nan_logits(target_name: str, dtype: torch.dtype) -> NumericalError:
    """Return the error for logits of the target that are not numbers."""
    remedy = (
        "float16 overflows beyond 65504: load the model with dtype=torch.bfloat16"
        if dtype == torch.float16
        else "check the weights and inputs; in float16 an overflow would be the likely "
        "cause, and bfloat16 the remedy"
    )
    return NumericalError(f"{target_name} produced logits that are NaN, in {dtype}; {remedy}")


def _child(parents: list[int], tokens: list[int], node: int, token: int) -> int | None:
    """Return the first child of a node with the given token."""
    return next(
        (
            child
            for child in range(node + 1, len(parents))
            if parents[child] == node and tokens[child] == token
        ),
        None,
    )


def _at(row: list[int], depth: int) -> int:
    """Return a row's token at a depth; any number after the end of an ended row."""
    return row[depth] if depth < len(row) else 0
