"""What a round decided: the path that survives and the tokens it emits."""

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Accepted:
    """The surviving path of every row.

    Args:
        path: Accepted nodes from the root on, padded with -1. All -1 in a row that emits nothing
            (finished, or waiting for slower rows).
        tokens: Token that the target chose after each node of `path`, padded with -1; the last
            one is the bonus token and becomes the next root.
        features: Features of the target that each token was chosen from, for proposers that ask
            for them.

    For a proposer whose draft was joined with others', the path ends where another's guesses were
    followed, before the tokens do.
    """

    path: Int[Tensor, "batch path"]
    tokens: Int[Tensor, "batch path"]
    features: Float[Tensor, "batch path hidden"] | None = None

    @classmethod
    def from_host(
        cls, paths: list[list[int]], emitted: list[list[int]], *, device: torch.device
    ) -> "Accepted":
        """Build from lists on the host, which are kept for `paths` and `emitted`."""
        width = max(map(len, paths))
        both = [[row + [-1] * (width - len(row)) for row in rows] for rows in (paths, emitted)]
        path, tokens = torch.tensor(both, dtype=torch.long, device=device)  # [2, batch, path]
        accepted = cls(path=path, tokens=tokens)
        vars(accepted).update(paths=paths, emitted=emitted)  # where cached_property looks
        return accepted

    @property
    def num_tokens(self) -> Int[Tensor, " batch"]:
        """Tokens emitted by each row: accepted_length + 1, or 0; more where the path ends early."""
        return (self.tokens >= 0).sum(1)

    @property
    def accepted_length(self) -> Int[Tensor, " batch"]:
        """Draft tokens kept in each row, without the bonus token; 0 in a row that emits nothing."""
        return ((self.path >= 0).sum(1) - 1).clamp(min=0)

    @property
    def bonus(self) -> Int[Tensor, " batch"]:
        """The last token emitted by each row, -1 in a row that emits nothing."""
        if self.path.shape[1] == 0:
            return self.path.new_full((len(self.path),), -1)
        return self.tokens.gather(1, (self.num_tokens - 1).clamp(min=0)[:, None])[:, 0]

    @property
    def last_features(self) -> Float[Tensor, "batch hidden"]:
        """Features that each row's bonus token was chosen from; of no use in an idle row."""
        assert self.features is not None, "the proposer asked for no features"
        last = (self.num_tokens - 1).clamp(min=0)
        return self.features[torch.arange(len(last), device=last.device), last]

    def with_features(self, node_features: Float[Tensor, "batch nodes hidden"]) -> "Accepted":
        """Return the same decisions together with features, given at all nodes of the draft."""
        indices = self.path.clamp(min=0)[:, :, None].expand(-1, -1, node_features.shape[2])
        return self.with_path_features(node_features.gather(1, indices))

    def with_path_features(self, features: Float[Tensor, "batch path hidden"]) -> "Accepted":
        """Return the same decisions together with features that each token was chosen from."""
        found = replace(self, features=features)
        known = vars(self)
        vars(found).update({name: known[name] for name in ("paths", "emitted") if name in known})
        return found

    def with_paths(self, paths: list[list[int]]) -> "Accepted":
        """Return the same tokens on other paths, which may be shorter: those of a joined draft."""
        width = self.path.shape[1]
        padded = [path + [-1] * (width - len(path)) for path in paths]
        device = self.path.device
        found = replace(self, path=torch.tensor(padded, dtype=torch.long, device=device))
        vars(found).update(paths=paths, emitted=self.emitted)
        return found

    @cached_property
    def paths(self) -> list[list[int]]:
        """`path` on the host, without padding; the first read syncs with the device."""
        return _unpadded(self.path)

    @cached_property
    def emitted(self) -> list[list[int]]:
        """`tokens` on the host, without padding; the first read syncs with the device."""
        return [
            row[: len(path)] for row, path in zip(self.tokens.tolist(), self.paths, strict=True)
        ]

    def cut(self, limits: list[int]) -> "Accepted":
        """Keep at most ``limits[b]`` emitted tokens of row b."""
        if all(len(path) <= limit for path, limit in zip(self.paths, limits, strict=True)):
            return self
        return Accepted.from_host(
            [path[:limit] for path, limit in zip(self.paths, limits, strict=True)],
            [row[:limit] for row, limit in zip(self.emitted, limits, strict=True)],
            device=self.path.device,
        )


def _unpadded(indices: Int[Tensor, "batch path"]) -> list[list[int]]:
    return [[index for index in row if index >= 0] for row in indices.tolist()]
