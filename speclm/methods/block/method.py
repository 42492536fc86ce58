"""Block drafters as a method: how their heads are recognised, loaded, saved and trained."""

import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from typing_extensions import override

from speclm.cards import HeadsCard
from speclm.config import (
    require_count,
    require_in_range,
    require_one_start,
    require_options,
    require_positive,
    require_size,
)
from speclm.errors import OptionError
from speclm.methods.registry import HeadsSource, Method, Recipe

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, TrainingArguments

    from speclm.drafting.formats import CheckpointFormat
    from speclm.drafting.heads_folder import Destination
    from speclm.drafting.interface import Proposer
    from speclm.files.weights import WeightFiles
    from speclm.methods.block.checkpoint import BlockCheckpoint
    from speclm.methods.block.config import BlockConfig
    from speclm.methods.block.network import BlockHeads
    from speclm.methods.block.objective import BlockObjective
    from speclm.training.heads_trainer import HeadsTrainer

_log = logging.getLogger("speclm")

_KINDS = ("dspark", "dflash", "jetspec")
_TITLES = dict(zip(_KINDS, ("DSpark", "DFlash", "JetSpec"), strict=True))
_LOSSES = (
    *("token_weight", "distribution_weight", "distance_weight", "confidence_weight"),
    *("temperature", "decay_length", "max_anchors"),
)
_WEIGHTS = partial(require_in_range, low=0.0, high=1e6)
_CHECKS: Mapping[str, Callable[[str, Any], None]] = {
    "num_layers": partial(require_count, low=1, high=64),
    "block_size": partial(require_count, low=2, high=64),
    "draft_vocab_size": require_size,
    **dict.fromkeys(_LOSSES[:4], _WEIGHTS),
    "temperature": require_positive,
    "decay_length": require_positive,
    "max_anchors": partial(require_count, low=1, high=2**20),
}
_SIGNS = re.compile("dflash|dspark|target_layer_ids|speculators_model_type", re.IGNORECASE)
_SUMMARY = """\
A small decoder for speculative decoding that drafts a block of tokens in one pass: {block}. It
reads several hidden states of the base model, which verifies all draft tokens in one forward.
"""
_BLOCKS = {
    "dspark": "a small head on top adds what each token says about the next",
    "dflash": "all positions of the block see each other",
    "jetspec": "a position of the block sees those before it",
}
_SOFTWARE = """\
The files are `model.safetensors` and `config.json`, in the layout of {layout}, which vLLM and
SGLang read. Layer ids in `config.json` count the layers of the base from 0. Run the heads in
bfloat16 or float32: float16 overflows.
"""


@dataclass(frozen=True, slots=True)
class BlockTrainingOptions:
    """Options of ``speclm train block``."""

    kind: Annotated[
        str | None,
        "dspark (with heads for the previous token and the confidence), dflash (a block that sees "
        "itself both ways) or jetspec (a causal block); dspark by default, with --init that of the "
        "heads.",
    ] = None
    num_layers: Annotated[int | None, "Decoder layers of new heads; 2 by default."] = None
    block_size: Annotated[int | None, "Positions of one pass of new heads; 8 by default."] = None
    draft_vocab_size: Annotated[
        int | None,
        "Tokens that new heads draft from, the most frequent of the data; by default all.",
    ] = None
    token_weight: Annotated[float | None, "Weight of the loss on the texts' tokens."] = None
    distribution_weight: Annotated[
        float | None, "Weight of the cross-entropy against the base's distribution."
    ] = None
    distance_weight: Annotated[
        float | None, "Weight of the distance to the base's probabilities."
    ] = None
    confidence_weight: Annotated[float | None, "Weight of the confidence head's loss."] = None
    temperature: Annotated[
        float | None, "Temperature of both distributions in the cross-entropy against the base's."
    ] = None
    decay_length: Annotated[
        float | None, "Positions over which the weight of a position falls to 37 %."
    ] = None
    max_anchors: Annotated[int | None, "Blocks of each text in a training step."] = None
    init: Annotated[
        str | None, "Folder or hub id of heads to start from; its files are not changed."
    ] = None
    init_revision: Annotated[str | None, "Branch, tag or commit of --init on the hub."] = None

    def __post_init__(self) -> None:
        if self.kind is not None and self.kind not in _KINDS:
            raise OptionError(f"--kind is {self.kind!r}, expected one of {_KINDS!r}; choose one")
        for name, check in _CHECKS.items():
            if getattr(self, name) is not None:
                check(f"--{name.replace('_', '-')}", getattr(self, name))
        sizes = ("num_layers", "block_size", "draft_vocab_size")
        named = {f"--{name.replace('_', '-')}": getattr(self, name) for name in sizes}
        require_one_start(self.init, self.init_revision, named)

    @property
    def losses(self) -> dict[str, Any]:
        """The settings of the loss that were given."""
        given = {name: getattr(self, name) for name in _LOSSES}
        return {name: value for name, value in given.items() if value is not None}


class BlockRecipe(Recipe):
    """Trains new or loaded block heads."""

    name = "block"
    summary = "Train heads that draft a block in one pass; the base stays as it is."
    options = BlockTrainingOptions
    # Source: the recipe of DSpark.
    defaults: ClassVar[Mapping[str, Any]] = {"learning_rate": 6e-4, "max_grad_norm": 1.0}

    @override
    def trainer(
        self,
        base: "PreTrainedModel",
        args: "TrainingArguments",
        *,
        options: BlockTrainingOptions,
        train_dataset: Any,
        eval_dataset: Any = None,
    ) -> "HeadsTrainer":
        from speclm.methods.block.objective import BlockObjective, BlockTrainingModel
        from speclm.training.heads_trainer import HeadsTrainer

        heads = self._heads(base, options, train_dataset, seed=args.seed)
        kind = options.kind or kind_of(heads.config)
        usual = BlockObjective.usual(kind, num_drafts=heads.config.num_drafts)
        objective = replace(usual, **options.losses)
        _require_effect(options, objective, has_confidence=heads.config.has_confidence)
        return HeadsTrainer(
            BlockTrainingModel(base, heads, objective=objective),
            args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
        )

    def _heads(
        self,
        base: "PreTrainedModel",
        options: BlockTrainingOptions,
        train_dataset: Any,
        *,
        seed: int,
    ) -> "BlockHeads":
        from speclm.methods.block.training import load_block_heads, new_block_heads
        from speclm.target import TargetView
        from speclm.training.dataset import choose_columns, count_tokens

        if options.init is not None:
            return load_block_heads(base, options.init, revision=options.init_revision)
        columns = None
        if options.draft_vocab_size is not None:
            counts = count_tokens(train_dataset, vocab_size=TargetView(base).vocab_size)
            columns = choose_columns(counts, options.draft_vocab_size)
        return new_block_heads(
            base,
            kind=options.kind or "dspark",
            num_layers=options.num_layers or 2,
            block_size=options.block_size or 8,
            columns=columns,
            seed=seed,
        )


class BlockMethod(Method):
    """A small decoder that drafts a block of tokens in one pass."""

    name = "block"
    summary = "a small decoder that drafts a block in one pass: DFlash, DSpark, JetSpec"
    aliases = _KINDS
    stores_trees = True
    recipes = (BlockRecipe(),)

    @override
    def find_weights(self, folder: Path) -> "WeightFiles | None":
        from speclm.methods.block.checkpoint import find_block

        return find_block(folder)

    @override
    def is_declared(self, folder: Path) -> bool:
        from speclm.files.atomic import read_json

        try:
            config = read_json(folder / "config.json")
            names = [*config.get("architectures", []), config.get("speculators_model_type", "")]
            is_named = any(kind in name.lower() for name in names for kind in ("dflash", "dspark"))
            return is_named or "dflash_config" in config
        except (OSError, ValueError, TypeError, AttributeError):
            return False

    @override
    def is_likely(self, folder: Path) -> bool:
        from speclm.files.weights import read_text

        return _SIGNS.search(read_text(folder / "config.json")) is not None

    @override
    def load(self, source: HeadsSource, target: "PreTrainedModel") -> "Proposer":
        from speclm.files.weights import floating_dtype
        from speclm.methods.block.checkpoint import build_block, read_block
        from speclm.methods.block.proposer import BlockProposer
        from speclm.methods.block.tree import BlockProposerConfig
        from speclm.target import TargetView, stored_matrices

        known = {"dtype", "tree", *(option.name for option in fields(BlockProposerConfig))}
        require_options(source.options, known, owner="block heads")
        assert source.folder is not None
        view = TargetView(target)
        checkpoint = read_block(source.folder, num_target_layers=view.num_layers)
        checkpoint = checkpoint.share(**stored_matrices(target))
        options = {"tree": checkpoint.choices, **source.options}
        dtype = floating_dtype(options.pop("dtype", _usual_dtype(target)))
        heads = build_block(checkpoint, dtype=dtype, device=view.device)
        heads = heads.eval().requires_grad_(requires_grad=False)
        return BlockProposer(heads, target=target, **options)

    @override
    def owns(self, proposer: "Proposer") -> bool:
        from speclm.methods.block.proposer import BlockProposer

        return isinstance(proposer, BlockProposer)

    @override
    def require_writable(self, folder: Path) -> None:
        from speclm.methods.block.checkpoint import require_writable

        require_writable(folder)

    @override
    def checkpoint(self, proposer: "Proposer", destination: "Destination") -> "BlockCheckpoint":
        from speclm.methods.block.checkpoint import block_checkpoint
        from speclm.methods.block.proposer import BlockProposer
        from speclm.target import stored_matrices

        assert isinstance(proposer, BlockProposer)
        return block_checkpoint(
            proposer.heads,
            base_name_or_path=destination.base_id,
            choices=proposer.config.paths,
        ).share(**stored_matrices(destination.base))

    @override
    def save(self, proposer: "Proposer", destination: "Destination") -> None:
        from speclm.methods.block.checkpoint import write_block
        from speclm.methods.block.proposer import BlockProposer

        assert isinstance(proposer, BlockProposer)
        checkpoint = self.checkpoint(proposer, destination)
        card = block_card(checkpoint, repo_id=destination.repo_id)
        write_block(
            destination.folder,
            checkpoint,
            num_target_layers=proposer.view.num_layers,
            card=destination.card(card.render()),
        )

    @override
    def formats(self) -> "tuple[CheckpointFormat[Any], ...]":
        from speclm.methods.block.checkpoint_formats import BLOCK_FORMATS

        return BLOCK_FORMATS

    @override
    def card(self, folder: Path) -> HeadsCard:
        from speclm.methods.block.checkpoint import read_block

        return block_card(read_block(folder))


def _usual_dtype(target: "PreTrainedModel") -> "torch.dtype":
    """Return the target's dtype, but bfloat16 for float16, whose range the heads' states exceed."""
    import torch

    if target.dtype != torch.float16:
        return target.dtype
    _log.info(
        "block heads run in bfloat16 next to a base in float16, which their states would overflow; "
        "pass dtype to change it"
    )
    return torch.bfloat16


def _require_effect(
    options: BlockTrainingOptions, objective: "BlockObjective", *, has_confidence: bool
) -> None:
    """Check that settings of the loss change it."""
    if options.confidence_weight and not has_confidence:
        raise OptionError(
            f"--confidence-weight is {options.confidence_weight}, found heads without a confidence "
            "head; leave it out, or train heads of --kind dspark"
        )
    if options.temperature is not None and not objective.distribution_weight:
        raise OptionError(
            f"--temperature is {options.temperature}, which only the cross-entropy against the "
            "base's distribution has; leave it out, or pass a --distribution-weight above 0"
        )


def kind_of(config: "BlockConfig") -> str:
    """Return which kind heads are most like: ``"dspark"``, ``"dflash"`` or ``"jetspec"``."""
    if config.markov is not None or config.has_confidence:
        return "dspark"
    return "jetspec" if all(config.is_causal) else "dflash"


def block_card(checkpoint: "BlockCheckpoint", *, repo_id: str | None = None) -> HeadsCard:
    """Return the model card of block heads."""
    from speclm.methods.block.layouts import is_of_deepspec

    config, choices = checkpoint.config, checkpoint.choices
    kind = kind_of(config)
    drafted = f"{config.draft_vocab_size:,} of {config.vocab_size:,}"
    markov = "none" if config.markov is None else f"{config.markov}, rank {config.markov_rank}"
    tensors = checkpoint.tensors.values()
    return HeadsCard(
        kind=kind,
        title=f"{_TITLES[kind]} heads",
        summary=_SUMMARY.format(block=_BLOCKS[kind]),
        facts={
            "decoder layers": config.num_layers,
            "draft tokens of one pass": config.num_drafts,
            "hidden states read": f"{', '.join(map(str, config.feature_layers))} (0 is the "
            "embeddings)",
            "head for the previous token": markov,
            "confidence head": "yes" if config.has_confidence else "no",
            "tokens drafted": drafted if config.has_draft_vocab else "all",
            "output matrix": "their own" if config.has_own_lm_head else "the base model's",
        },
        software=_SOFTWARE.format(
            layout="DeepSpec's DSpark" if is_of_deepspec(config) else "z-lab's DFlash"
        ),
        num_parameters=sum(tensor.numel() for tensor in tensors if tensor.is_floating_point()),
        dtype=str(checkpoint.dtype).removeprefix("torch."),
        num_nodes=None if choices is None else len(choices),
        base=checkpoint.base_name_or_path,
        repo_id=repo_id,
    )
