"""Draft trees with EAGLE heads, which continue the target's features."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel
from typing_extensions import override

from speclm.config import require_known
from speclm.drafting.interface import TargetNeeds
from speclm.drafting.level_proposer import LevelProposer, LevelProposerConfig
from speclm.drafting.levels import options_with_tree
from speclm.errors import OptionError, VocabularyMismatchError
from speclm.methods.eagle.config import EagleConfig
from speclm.methods.eagle.context import EagleContext
from speclm.methods.eagle.network import EagleHeads
from speclm.target import TargetFeatures, TargetView


@dataclass(frozen=True, slots=True)
class EagleProposerConfig(LevelProposerConfig):
    """Settings of `EagleProposer`; each level costs one run of the heads."""


class EagleProposer(LevelProposer):
    """Grows a tree with a small decoder that continues the target's own hidden states.

    Committed positions of the heads' cache are computed from the target's features; positions
    computed from draft tokens are dropped in every round.

    Source: Li et al. 2024 (EAGLE-2), Li et al. 2025 (EAGLE-3).
    """

    config: EagleProposerConfig

    def __init__(
        self,
        heads: EagleHeads,
        *,
        target: PreTrainedModel,
        tree: str | Sequence[int] | Sequence[Sequence[int]] | None = None,
        **options: Any,
    ) -> None:
        """Wrap trained heads.

        Args:
            heads: Heads trained on the target, on its device. Their weights must not change.
            target: The model that verifies.
            tree: Name of a preset, the number of children at each depth, or paths of ranks;
                `num_draft_tokens` keeps the first nodes by depth. None grows trees by
                probability.
            **options: Fields of `EagleProposerConfig`.

        Raises:
            VocabularyMismatchError: If the heads were made for another vocabulary.
            OptionError: If an option is unknown or out of range, a rank exceeds the heads'
                vocabulary, or they have another width.
            TopologyError: If `tree` is not a tree.
            UnsupportedModelError: If the target lacks the layers whose features are read, or its
                embeddings are quantised or offloaded and the heads have none of their own.
        """
        require_known(EagleProposerConfig, options, owner="EagleProposer")
        if tree is not None:
            options = options_with_tree(tree, options)
        config = EagleProposerConfig(**options)
        self.heads, self.view = heads.fuse_(), TargetView(target)
        wanted = heads.config
        _require_match(wanted, self.view)
        if heads.embed_tokens is None:
            _ = self.view.embedding_weight  # raises if the target's cannot be read
        is_eagle3 = wanted.kind == "eagle3"
        self._features = (
            TargetFeatures(wanted.layers_to_read(self.view.num_layers))
            if is_eagle3
            else TargetFeatures.LAST_HIDDEN
        )
        self.needs = TargetNeeds(
            vocab_size=wanted.vocab_size, hidden_size=wanted.target_hidden_size, model=target
        )
        self._prepare(
            config,
            context=EagleContext(self.heads, self.view),
            vocabulary=self.heads,
            sizes=(wanted.draft_vocab_size, wanted.vocab_size),
        )

    @property
    @override
    def features(self) -> TargetFeatures:  # type: ignore[override]  # the heads decide
        return self._features


def _require_match(wanted: EagleConfig, view: TargetView) -> None:
    if wanted.vocab_size != view.vocab_size:
        raise VocabularyMismatchError(
            f"EAGLE heads have a vocabulary of {wanted.vocab_size}, the target {view.name} one of "
            f"{view.vocab_size}; use heads that were trained on it"
        )
    if wanted.target_hidden_size != view.hidden_size:
        raise OptionError(
            f"EAGLE heads read features of width {wanted.target_hidden_size}, those of {view.name} "
            f"are {view.hidden_size} wide; use heads that were trained on it"
        )
