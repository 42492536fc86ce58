"""EAGLE as a method: how its heads are recognised, loaded, saved and trained."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from typing_extensions import override

from speclm.cards import HeadsCard
from speclm.config import (
    require_count,
    require_in_range,
    require_one_start,
    require_options,
    require_size,
)
from speclm.errors import OptionError
from speclm.methods.registry import HeadsSource, Method, Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedModel, TrainingArguments

    from speclm.drafting.formats import CheckpointFormat
    from speclm.drafting.heads_folder import Destination
    from speclm.drafting.interface import Proposer
    from speclm.files.weights import WeightFiles
    from speclm.methods.eagle.checkpoint import EagleCheckpoint
    from speclm.methods.eagle.network import EagleHeads
    from speclm.training.heads_trainer import HeadsTrainer

TOKEN_MAPS = "freq_*.pt"
"""Pattern of FR-Spec's token maps: ids of the tokens that EAGLE-1 heads draft, for SGLang."""

MAX_DRAFT_VOCAB_SIZE = 32_000
"""Maximum default size of the draft vocabulary of new heads; that of the authors' heads."""

MAX_STEPS = 32
"""Maximum draft tokens in a row that are trained or measured."""

_MAX_LAYERS = 64
_SUMMARY = """\
A small decoder for speculative decoding. It joins {features} of the base model with the token that
came after it and drafts one token after another; the base model verifies all draft tokens in one
forward.
"""
_SOFTWARE = {
    "eagle": """\
The files are `model.safetensors` and `config.json`, in the layout of SafeAILab's EAGLE-1 and 2.
vLLM reads it too, but ignores a bias after the joined inputs.
""",
    "reduced": """\
The files are `model.safetensors` and `config.json`, in the layout of SafeAILab's EAGLE-1 and 2 with
the tokens that are drafted as `d2t`, which only speclm reads. For SGLang, `speclm convert` writes
them as a token map.
""",
    "eagle3": """\
The files are `model.safetensors` and `config.json`, in the layout of SafeAILab's and SpecForge's
EAGLE-3. vLLM and SGLang read heads of one layer in it. SGLang's layer ids are one higher than those
in `config.json`, and it has no residual after the norm.
""",
}


@dataclass(frozen=True, slots=True)
class _TrainingOptions:
    num_layers: Annotated[int | None, "Decoder layers of new heads; 1 by default."] = None
    num_steps: Annotated[int, "Draft tokens in a row that are trained."] = 1
    decay: Annotated[float, "Weight of a step relative to the one before it."] = 0.8
    init: Annotated[
        str | None, "Folder or hub id of heads to start from; its files are not changed."
    ] = None
    init_revision: Annotated[str | None, "Branch, tag or commit of --init on the hub."] = None

    def __post_init__(self) -> None:
        require_count("num_steps", self.num_steps, low=1, high=MAX_STEPS)
        require_in_range("decay", self.decay, low=0.0, high=1.0)
        sizes: dict[str, object] = {"--num-layers": self.num_layers}
        if isinstance(self, Eagle3TrainingOptions):
            sizes["--draft-vocab-size"] = self.draft_vocab_size
            if self.draft_vocab_size is not None:
                require_size("--draft-vocab-size", self.draft_vocab_size)
        if self.num_layers is not None:
            require_count("--num-layers", self.num_layers, low=1, high=_MAX_LAYERS)
        require_one_start(self.init, self.init_revision, sizes)


@dataclass(frozen=True, slots=True)
class EagleTrainingOptions(_TrainingOptions):
    """Options of ``speclm train eagle``."""

    noise: Annotated[float, "Width of the noise on the base's features."] = 0.2

    def __post_init__(self) -> None:
        _TrainingOptions.__post_init__(self)  # super() does not work in a slotted dataclass
        require_in_range("noise", self.noise, low=0.0, high=1e6)


@dataclass(frozen=True, slots=True)
class Eagle3TrainingOptions(_TrainingOptions):
    """Options of ``speclm train eagle3``."""

    num_steps: Annotated[int, "Draft tokens in a row that are trained."] = 7
    draft_vocab_size: Annotated[
        int | None,
        "Tokens that new heads draft from, the most frequent of the data; by default all, at "
        f"most {MAX_DRAFT_VOCAB_SIZE}.",
    ] = None


class EagleRecipe(Recipe):
    """Trains new or loaded EAGLE heads of one kind."""

    # Source: the recipes of the EAGLE authors and SpecForge.
    defaults: ClassVar[Mapping[str, Any]] = {
        "learning_rate": 1e-4,
        "adam_beta2": 0.95,
        "max_grad_norm": 0.5,
    }

    def __init__(self, kind: str, summary: str, options: type) -> None:
        self.name, self.summary, self.options = kind, summary, options

    @override
    def trainer(
        self,
        base: "PreTrainedModel",
        args: "TrainingArguments",
        *,
        options: EagleTrainingOptions | Eagle3TrainingOptions,
        train_dataset: Any,
        eval_dataset: Any = None,
    ) -> "HeadsTrainer":
        from speclm.methods.eagle.objective import EagleObjective, EagleTrainingModel
        from speclm.training.heads_trainer import HeadsTrainer

        usual = EagleObjective.usual(self.name)
        changes: dict[str, Any] = {"num_steps": options.num_steps, "decay": options.decay}
        if isinstance(options, EagleTrainingOptions):
            changes["num_measured"] = max(options.num_steps, usual.num_measured)
            changes["noise"] = options.noise
        else:
            changes["num_measured"] = options.num_steps
        heads = self._heads(base, options, train_dataset, seed=args.seed)
        return HeadsTrainer(
            EagleTrainingModel(base, heads, objective=replace(usual, **changes)),
            args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
        )

    def _heads(
        self, base: "PreTrainedModel", options: Any, train_dataset: Any, *, seed: int
    ) -> "EagleHeads":
        """Return loaded or new heads; EAGLE-3 heads get the draft vocabulary of the data."""
        from speclm.methods.eagle.training import load_eagle_heads, new_eagle_heads
        from speclm.target import TargetView
        from speclm.training.dataset import choose_columns, count_tokens

        if options.init is not None:
            heads = load_eagle_heads(base, options.init, revision=options.init_revision)
            if heads.config.kind != self.name:
                raise OptionError(
                    f"--init {options.init!r} are heads of {heads.config.kind}, expected "
                    f"{self.name}; train them with: speclm train {heads.config.kind}"
                )
            return heads
        columns = None
        if isinstance(options, Eagle3TrainingOptions):
            vocab_size = TargetView(base).vocab_size
            size = options.draft_vocab_size or min(MAX_DRAFT_VOCAB_SIZE, vocab_size)
            columns = choose_columns(count_tokens(train_dataset, vocab_size=vocab_size), size)
        num_layers = options.num_layers or 1
        return new_eagle_heads(
            base, kind=self.name, columns=columns, num_layers=num_layers, seed=seed
        )


class EagleMethod(Method):
    """A small decoder that continues the target's own hidden states."""

    name = "eagle"
    summary = "a small decoder on the target's hidden states: EAGLE-1, EAGLE-2, EAGLE-3"
    aliases = ("eagle2", "eagle3")
    stores_trees = True
    extras = (TOKEN_MAPS,)
    recipes = (
        EagleRecipe(
            "eagle",
            "Train heads of EAGLE-1, which EAGLE-2 uses too; the base stays as it is.",
            EagleTrainingOptions,
        ),
        EagleRecipe(
            "eagle3", "Train heads of EAGLE-3; the base stays as it is.", Eagle3TrainingOptions
        ),
    )

    @override
    def find_weights(self, folder: Path) -> "WeightFiles | None":
        from speclm.methods.eagle.checkpoint import find_eagle

        return find_eagle(folder)

    @override
    def is_declared(self, folder: Path) -> bool:
        from speclm.files.atomic import read_json

        try:
            names = read_json(folder / "config.json")["architectures"]
            return any("eagle" in name.lower() for name in names)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return False

    @override
    def is_likely(self, folder: Path) -> bool:
        from speclm.files.weights import read_text

        # The first published heads have the config of a Llama with one layer.
        text = read_text(folder / "config.json")
        return "eagle" in text.lower() or re.search(r'"num_hidden_layers": *1\b', text) is not None

    @override
    def load(self, source: HeadsSource, target: "PreTrainedModel") -> "Proposer":
        from speclm.files.weights import floating_dtype
        from speclm.methods.eagle.checkpoint import read_eagle
        from speclm.methods.eagle.network import build_eagle
        from speclm.methods.eagle.proposer import EagleProposer, EagleProposerConfig
        from speclm.target import TargetView, stored_matrices

        known = {
            "dtype",
            "tree",
            "token_map",
            *(option.name for option in fields(EagleProposerConfig)),
        }
        require_options(source.options, known, owner="EAGLE heads")
        assert source.folder is not None
        options = dict(source.options)
        checkpoint = read_eagle(source.folder, token_map=options.pop("token_map", "auto"))
        checkpoint = checkpoint.share(**stored_matrices(target))
        options = {"tree": checkpoint.choices, **options}
        dtype = floating_dtype(options.pop("dtype", target.dtype))
        heads = build_eagle(checkpoint, dtype=dtype, device=TargetView(target).device)
        heads = heads.eval().requires_grad_(requires_grad=False)
        return EagleProposer(heads, target=target, **options)

    @override
    def owns(self, proposer: "Proposer") -> bool:
        from speclm.methods.eagle.proposer import EagleProposer

        return isinstance(proposer, EagleProposer)

    @override
    def require_writable(self, folder: Path) -> None:
        from speclm.methods.eagle.checkpoint import require_writable

        require_writable(folder)

    @override
    def checkpoint(self, proposer: "Proposer", destination: "Destination") -> "EagleCheckpoint":
        from speclm.methods.eagle.checkpoint import eagle_checkpoint
        from speclm.methods.eagle.proposer import EagleProposer
        from speclm.target import stored_matrices

        assert isinstance(proposer, EagleProposer)
        return eagle_checkpoint(
            proposer.heads,
            base_name_or_path=destination.base_id,
            choices=proposer.config.paths,
        ).share(**stored_matrices(destination.base))

    @override
    def save(self, proposer: "Proposer", destination: "Destination") -> None:
        from speclm.methods.eagle.checkpoint import write_eagle
        from speclm.methods.eagle.proposer import EagleProposer

        assert isinstance(proposer, EagleProposer)
        checkpoint = self.checkpoint(proposer, destination)
        num_layers = proposer.view.num_layers
        card = eagle_card(checkpoint, num_target_layers=num_layers, repo_id=destination.repo_id)
        write_eagle(
            destination.folder,
            checkpoint,
            num_target_layers=num_layers,
            card=destination.card(card.render()),
        )

    @override
    def formats(self) -> "tuple[CheckpointFormat[Any], ...]":
        from speclm.methods.eagle.checkpoint_formats import EAGLE_FORMATS

        return EAGLE_FORMATS

    @override
    def companions(self, folder: Path) -> list[Path]:
        return sorted(folder.glob(TOKEN_MAPS))

    @override
    def card(self, folder: Path) -> HeadsCard:
        from speclm.methods.eagle.checkpoint import read_eagle

        return eagle_card(read_eagle(folder))


def eagle_card(
    checkpoint: "EagleCheckpoint",
    *,
    num_target_layers: int | None = None,
    repo_id: str | None = None,
) -> HeadsCard:
    """Return the model card of EAGLE heads.

    Args:
        checkpoint: The heads.
        num_target_layers: Decoder layers of the base; None if they are not known.
        repo_id: Where the heads will be found, if known.
    """
    config, choices = checkpoint.config, checkpoint.choices
    is_eagle3 = config.kind == "eagle3"
    is_reduced = config.has_draft_vocab and not is_eagle3
    read = config.feature_layers
    if is_eagle3 and num_target_layers is not None:
        read = config.layers_to_read(num_target_layers)
    layers = "the last"
    if is_eagle3:
        named = "2, n // 2 and n - 3 of n layers" if read is None else ", ".join(map(str, read))
        layers = f"{named} (0 is the embeddings)"
    drafted = f"{config.draft_vocab_size:,} of {config.vocab_size:,}"
    tensors = checkpoint.tensors.values()
    return HeadsCard(
        kind=config.kind,
        title="EAGLE-3 heads" if is_eagle3 else "EAGLE heads",
        summary=_SUMMARY.format(
            features="several hidden states" if is_eagle3 else "the last hidden state"
        ),
        facts={
            "decoder layers": config.num_layers,
            "hidden states read": layers,
            "tokens drafted": drafted if config.has_draft_vocab else "all",
            "output matrix": "their own" if config.has_own_lm_head else "the base model's",
        },
        software=_SOFTWARE["reduced" if is_reduced else config.kind],
        num_parameters=sum(tensor.numel() for tensor in tensors if tensor.is_floating_point()),
        dtype=str(checkpoint.dtype).removeprefix("torch."),
        num_nodes=None if choices is None else len(choices),
        base=checkpoint.base_name_or_path,
        repo_id=repo_id,
    )
