"""MTP as a method: how the layers are found next to the target's own, saved and trained."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from typing_extensions import override

from speclm.cards import HeadsCard
from speclm.config import (
    require_count,
    require_in_range,
    require_one_start,
    require_options,
)
from speclm.errors import CheckpointError, OptionError, shown
from speclm.methods.registry import HeadsSource, Method, Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedModel, TrainingArguments

    from speclm.drafting.formats import CheckpointFormat
    from speclm.drafting.heads_folder import Destination
    from speclm.drafting.interface import Proposer
    from speclm.files.weights import WeightFiles
    from speclm.methods.mtp.checkpoint_writing import SavedLayers
    from speclm.training.heads_trainer import HeadsTrainer

NUM_STEPS, DECAY = 3, 0.6
"""Draft tokens in a row that are trained, and the weight of each relative to the one before it."""

MAX_STEPS = 32
"""Maximum draft tokens in a row that are trained or measured."""

_SUMMARY = """\
Multi-token prediction (MTP) layers of the base model, trained further for speculative decoding.
Each joins a hidden state with the embedding of the next token and drafts the token after it; the
base model verifies all draft tokens in one forward.
"""
_SOFTWARE = """\
The file is `model.safetensors`, with the keys that the layers have in the files of the base model.
For vLLM, SGLang and Transformers, `speclm convert --to whole --base ...` writes a copy of the base
model with these layers in place of its own.
"""


@dataclass(frozen=True, slots=True)
class MtpTrainingOptions:
    """Options of ``speclm train mtp``."""

    num_steps: Annotated[int, "Draft tokens in a row that are trained."] = NUM_STEPS
    decay: Annotated[float, "Weight of a step relative to the one before it."] = DECAY
    init: Annotated[
        str | None,
        "Folder or hub id of trained layers to start from in place of the base's own; its files "
        "are not changed.",
    ] = None
    init_revision: Annotated[str | None, "Branch, tag or commit of --init on the hub."] = None

    def __post_init__(self) -> None:
        require_count("num_steps", self.num_steps, low=1, high=MAX_STEPS)
        require_in_range("decay", self.decay, low=0.0, high=1.0)
        require_one_start(self.init, self.init_revision, {})


class MtpRecipe(Recipe):
    """Trains the MTP layers of a base, or saved ones, further."""

    name = "mtp"
    summary = "Train the base's own MTP layers further; the rest of the base stays as it is."
    options = MtpTrainingOptions
    defaults: ClassVar[Mapping[str, Any]] = {
        "learning_rate": 5e-5,  # Source: Cai et al. 2025 (FastMTP)
        "adam_beta2": 0.95,
    }

    @override
    def trainer(
        self,
        base: "PreTrainedModel",
        args: "TrainingArguments",
        *,
        options: MtpTrainingOptions,
        train_dataset: Any,
        eval_dataset: Any = None,
    ) -> "HeadsTrainer":
        from speclm.methods.mtp.training import MtpObjective, MtpTrainingModel, load_mtp_heads
        from speclm.training.heads_trainer import HeadsTrainer

        heads = load_mtp_heads(base, options.init, revision=options.init_revision)
        num_measured = max(options.num_steps, MtpObjective().num_measured)
        objective = MtpObjective(
            num_steps=options.num_steps, num_measured=num_measured, decay=options.decay
        )
        return HeadsTrainer(
            MtpTrainingModel(base, heads, objective=objective),
            args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
        )


class MtpMethod(Method):
    """The multi-token prediction layers that come with the target's weights, or trained ones.

    Its options are the fields of `MtpProposerConfig`, `tree`, `dtype`, and for ``heads="mtp"`` also
    those of `HubOptions`, and `heads_path`, the folder or hub id of files with the layers, if the
    target's are elsewhere.
    """

    name = "mtp"
    summary = "the layers of the base's own checkpoint that were trained to predict further tokens"
    is_named = True
    reads_base_files = True
    stores_trees = True
    recipes = (MtpRecipe(),)

    @override
    def find_weights(self, folder: Path) -> "WeightFiles | None":
        from speclm.methods.mtp.checkpoint_writing import find_layers

        return find_layers(folder)

    @override
    def is_declared(self, folder: Path) -> bool:
        from speclm.methods.mtp.checkpoint_writing import is_declared

        return is_declared(folder)

    @override
    def is_likely(self, folder: Path) -> bool:
        return self.is_declared(folder)

    @override
    def load(self, source: HeadsSource, target: "PreTrainedModel") -> "Proposer":
        from speclm.files.weights import FLOATS, floating_dtype
        from speclm.methods.mtp.assembly import build_mtp
        from speclm.methods.mtp.checkpoint import read_mtp
        from speclm.methods.mtp.proposer import MtpProposer, MtpProposerConfig
        from speclm.target import TargetView

        known = {"dtype", "tree", *(f.name for f in fields(MtpProposerConfig))}
        view, options = TargetView(target), dict(source.options)
        if source.folder is None:
            folder = _files_of_base(options, target, known)
        else:
            require_options(options, known, owner="MTP layers")
            folder = source.folder
            options = {"tree": _saved_tree(folder, view.num_layers), **options}
        checkpoint = read_mtp(folder, target.config.get_text_config())
        # That of a base in 8 bits is no dtype to compute with.
        usual = target.dtype if target.dtype in FLOATS else view.embedding_weight.dtype
        dtype = floating_dtype(options.pop("dtype", usual))
        heads = build_mtp(checkpoint, view, dtype=dtype, device=view.device)
        return MtpProposer(heads, target=target, **options)

    @override
    def owns(self, proposer: "Proposer") -> bool:
        from speclm.methods.mtp.proposer import MtpProposer

        return isinstance(proposer, MtpProposer)

    @override
    def require_writable(self, folder: Path) -> None:
        from speclm.methods.mtp.checkpoint_writing import require_writable

        require_writable(folder)

    @override
    def checkpoint(self, proposer: "Proposer", destination: "Destination") -> "SavedLayers":
        from speclm.methods.mtp.checkpoint_writing import saved_layers
        from speclm.methods.mtp.proposer import MtpProposer

        assert isinstance(proposer, MtpProposer)
        return saved_layers(
            proposer.heads,
            proposer.view,
            base_name_or_path=destination.base_id,
            choices=proposer.config.paths,
        )

    @override
    def save(self, proposer: "Proposer", destination: "Destination") -> None:
        from speclm.methods.mtp.checkpoint_writing import write_mtp

        layers = self.checkpoint(proposer, destination)
        card = destination.card(mtp_card(layers, repo_id=destination.repo_id).render())
        write_mtp(destination.folder, layers, card=card)

    @override
    def formats(self) -> "tuple[CheckpointFormat[Any], ...]":
        from speclm.methods.mtp.checkpoint_formats import MTP_FORMATS

        return MTP_FORMATS

    @override
    def card(self, folder: Path) -> HeadsCard:
        from speclm.methods.mtp.checkpoint_writing import read_layers

        return mtp_card(read_layers(folder))


def mtp_card(layers: "SavedLayers", *, repo_id: str | None = None) -> HeadsCard:
    """Return the model card of MTP layers.

    Args:
        layers: The layers.
        repo_id: Where they will be found, if known.
    """
    tensors = layers.tensors.values()
    return HeadsCard(
        kind="mtp",
        title="MTP layers",
        summary=_SUMMARY,
        facts={"MTP layers": layers.num_steps, "layers of the base": layers.num_target_layers},
        software=_SOFTWARE,
        num_parameters=sum(tensor.numel() for tensor in tensors if tensor.is_floating_point()),
        dtype=str(layers.dtype).removeprefix("torch."),
        num_nodes=None if layers.choices is None else len(layers.choices),
        base=layers.base_name_or_path,
        repo_id=repo_id,
    )


def _files_of_base(options: dict[str, Any], target: "PreTrainedModel", known: set[str]) -> Path:
    """Return the folder of a target's files, or of those that options name, which are taken out."""
    from speclm.files.hub import HubOptions, path_exists
    from speclm.methods.mtp.checkpoint import fetch_mtp
    from speclm.target import TargetView
    from speclm.target.loading import hub_commit

    hub, rest = HubOptions.split(options)
    require_options(rest, {"heads_path", *known}, owner="MTP layers")
    path = rest.pop("heads_path", None)
    options.clear()
    options.update(rest)
    if path is None:
        path = target.config.name_or_path
        if not path:
            raise OptionError(
                "base is a loaded model that names no files, and heads 'mtp' are read from "
                "those of the base; pass heads_kwargs={'heads_path': its folder or hub id}"
            )
        commit = hub_commit(target)
        if commit is not None and hub.revision is None:
            hub = HubOptions(**{**hub.given, "revision": commit})
    elif not isinstance(path, str | Path):
        raise OptionError(
            f"heads_path is {shown(path)}, expected the folder or hub id of files with MTP layers"
        )
    elif "revision" in hub.given and path_exists(path):
        raise OptionError(
            f"heads_path {str(path)!r} is a folder and revision {hub.revision!r} would have no "
            "effect; leave it out, or pass a hub id"
        )
    return fetch_mtp(str(path), hub, num_layers=TargetView(target).num_layers)


def _saved_tree(folder: Path, num_layers: int) -> Any:
    """Return the static tree of saved layers, which must be those of a base of so many layers."""
    from speclm.drafting.heads_folder import CONFIG_NAME
    from speclm.methods.mtp.checkpoint_writing import read_layers

    if not (folder / CONFIG_NAME).is_file():
        return None  # a file of the layers, without more
    layers = read_layers(folder)
    if layers.num_target_layers != num_layers:
        raise CheckpointError(
            f"{folder / CONFIG_NAME}: the MTP layers are of a base with "
            f"{layers.num_target_layers} layers, expected {num_layers}, those of the loaded base; "
            "name the base that they were trained on"
        )
    return layers.choices
