"""A draft of block heads as a stage of fixed shapes, which an engine can compile or record."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from typing_extensions import override

from speclm.devices import upload
from speclm.drafting.ranking import LevelRanking
from speclm.engines import Engine, StageRunner, agree
from speclm.methods.block.context import BlockContext
from speclm.methods.block.network import BlockHeads, block_masks
from speclm.methods.block.tree import (
    BlockLogits,
    BlockProposerConfig,
    choose_nodes,
    enclosing_tree_of,
)
from speclm.target import TargetView
from speclm.tree.enclosing import ChosenNodes

_MAX_STAGES = 16  # sizes of drafts


class BlockStage(nn.Module):
    """Adds a round's features to the context, runs the heads over a block, and chooses a tree."""

    def __init__(
        self, heads: BlockHeads, view: TargetView, config: BlockProposerConfig, *, depth: int
    ) -> None:
        """Hold the heads, for greedy drafts of one size.

        Args:
            heads: The network.
            view: The target.
            config: Size of the trees.
            depth: Levels of the trees.
        """
        super().__init__()
        self._heads, self._view, self._config = heads, view, config
        self._depth = depth
        self._tree = enclosing_tree_of(config, heads, depth=depth, device=view.device)
        self._ranking = LevelRanking(vocab_size=heads.config.vocab_size)
        self.num_positions = positions_of(heads, depth)

    @override
    def forward(
        self,
        features: Float[Tensor, "batch path features"],
        roots: Int[Tensor, " batch"],
        sizes: Int[Tensor, "3 batch"],
        storage: Float[Tensor, "2 layers batch kv_heads capacity head_dim"],
    ) -> ChosenNodes:
        """Draft for every row, see `compute`."""
        return self.compute(features, roots, sizes, storage)[1]

    def compute(
        self,
        features: Float[Tensor, "batch path features"],
        roots: Int[Tensor, " batch"],
        sizes: Int[Tensor, "3 batch"],
        storage: Float[Tensor, "2 layers batch kv_heads capacity head_dim"],
    ) -> tuple[Float[Tensor, "batch drafts hidden"], ChosenNodes]:
        """Return the states at the positions that draft, and the nodes.

        Args:
            features: Features of the tokens since the last draft; those after a row's count may be
                anything.
            roots: Last token of each row.
            sizes: For each row the position of its first entry, the number of its entries in the
                context, and of its new features.
            storage: Keys and values of the context. The last entries are room for a block.
        """
        heads, (keys, values) = self._heads, storage.unbind(0)
        first, lengths, counts = sizes[:, :, None].unbind(0)  # [batch, 1] each
        ahead = torch.arange(features.shape[1], device=features.device)
        entries = lengths + ahead
        new_keys, new_values = heads.context(
            features, heads.rotation((first + entries).clamp(min=0))
        )
        indices = entries[None, :, None, :, None].expand_as(new_keys)
        keys.scatter_(3, indices, new_keys)
        values.scatter_(3, indices, new_values)
        anchors = first + lengths + counts
        within = torch.arange(self.num_positions, device=features.device)
        entries = torch.arange(keys.shape[3] - self.num_positions, device=features.device)
        positions = first + entries
        masks = block_masks(
            heads.config,
            ((positions >= 0) & (entries < lengths + counts))[:, None],
            context_positions=positions,
            anchors=anchors,
            num_positions=self.num_positions,
        )
        embeds = heads.embed_blocks(
            roots[:, None],
            num_positions=self.num_positions,
            embedding=self._view.stored_embeddings,
        )
        rotation = heads.rotation((anchors + within).clamp(min=0))
        hidden = heads(embeds, rotation, keys, values, masks, has_room=True)[:, : self._depth]
        logits = heads.logits(hidden, lm_head=self._view.head_logits)
        chosen = choose_nodes(
            BlockLogits(heads, hidden, logits),
            roots,
            self._tree,
            config=self._config,
            ranking=self._ranking,
        )
        return hidden, chosen


class BlockStages(StageRunner):
    """Runs drafts by an engine; what it cannot run is left to the caller."""

    def __init__(self, heads: BlockHeads, view: TargetView, engine: Engine) -> None:
        """Prepare nothing yet."""
        obstacle = engine.obstacle(view.device)
        if heads.rotates_by_length:
            obstacle = "rotations of the block heads depend on the longest text"
        super().__init__(engine, obstacle=obstacle)
        self._heads, self._view = heads, view
        self._state = self._weights()
        self._by_size: dict[tuple[int, ...], BlockStage] = {}

    def serves(self, engine: Engine) -> bool:
        """Return whether what was prepared is for an engine and the weights as they are now."""
        return self.engine is engine and self._state == self._weights()

    def stage_of(self, config: BlockProposerConfig, *, depth: int) -> BlockStage | None:
        """Return the stage for drafts of a size; None before `prove`."""
        return self._by_size.get(_size(config, depth))

    def inputs(
        self,
        context: BlockContext,
        features: Float[Tensor, "batch path features"] | None,
        counts: list[int],
        roots: Int[Tensor, " batch"],
        *,
        depth: int,
    ) -> list[Tensor]:
        """Return the inputs of a stage, and make room in the context.

        Args:
            context: The context, without the features.
            features: Features of the tokens since the last draft, at most ``depth + 1`` a row; None
                if there are none.
            counts: Their number in each row.
            roots: Last token of each row.
            depth: Levels of the draft.
        """
        length = depth + 1  # of the longest path
        config, weight = self._heads.config, self._heads.fc.weight
        if features is None:
            width = len(config.feature_layers) * config.hidden_size
            features = weight.new_zeros(len(counts), 1, width)
        missing = length - features.shape[1]
        padded = F.pad(features.to(weight.dtype), (0, 0, 0, missing)) if missing else features
        context.reserve(length + positions_of(self._heads, depth))
        sizes = [context.first_positions, context.lengths, counts]
        return [padded, roots, upload(sizes, roots.device)]

    def prove(
        self,
        config: BlockProposerConfig,
        inputs: Sequence[Tensor],
        context: BlockContext,
        expected: Float[Tensor, "batch drafts hidden"],
    ) -> None:
        """Keep a stage for drafts of a size, if it computes the states of a usual draft.

        Args:
            config: Size of the drafts.
            inputs: Result of `inputs` before that draft.
            context: The context after it.
            expected: Its states.
        """
        depth = expected.shape[1]
        if self.obstacle is not None:
            return
        try:
            stage = BlockStage(self._heads, self._view, config, depth=depth)
            features, roots, sizes = inputs
            hidden, _ = stage.compute(features, roots, sizes, context.storage)
        except Exception as error:  # noqa: BLE001 - also the target's own code runs
            self.give_up(f"a draft over fixed shapes fails: {type(error).__name__}, {error}")
            return
        if not agree(hidden, expected):  # read once for each size
            self.give_up("block heads compute something else over fixed shapes")
            return
        if len(self._by_size) == _MAX_STAGES:
            self.forget(self._by_size.pop(next(iter(self._by_size))))
        self._by_size[_size(config, depth)] = stage

    def draft(
        self, stage: BlockStage, inputs: Sequence[Tensor], context: BlockContext
    ) -> ChosenNodes | None:
        """Return a draft; None if the engine cannot run it."""
        found = self.run(stage, inputs, [context.storage])
        return None if found is None else ChosenNodes(*found)

    def _weights(self) -> list[object]:
        """Return the second form of the weights, and the addresses that stages may read."""
        heads, target = self._heads, self._view.model
        weights = [*heads.parameters(), *heads.buffers()]
        if heads.embed_tokens is None:
            weights.append(self._view.embedding_weight)
        if heads.lm_head is None:
            weights += target.get_output_embeddings().parameters()  # type: ignore[no-untyped-call]
        return [heads.form, *map(Tensor.data_ptr, weights)]


def positions_of(heads: BlockHeads, depth: int) -> int:
    """Return how many positions of a block are computed for a draft of some levels."""
    config = heads.config
    unused = config.num_drafts - depth if all(config.is_causal) else 0
    return config.block_size - unused


def _size(config: BlockProposerConfig, depth: int) -> tuple[int, ...]:
    return depth, config.num_draft_tokens, config.width, config.branches
