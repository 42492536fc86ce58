"""From a proposer to a folder of heads, with its model card, and to the hub."""

import re
from dataclasses import dataclass
from functools import singledispatch
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import HfApi
from transformers import PreTrainedModel

from speclm.cards import GENERATED_MARK, EagleCard, MedusaCard
from speclm.errors import OptionError
from speclm.formats import MedusaCheckpoint, write_eagle, write_medusa
from speclm.heads.eagle import eagle_checkpoint
from speclm.proposers.eagle import EagleProposer
from speclm.proposers.interface import Proposer
from speclm.proposers.medusa import MedusaProposer
from speclm.target import stored_matrices

CARD_NAME = "README.md"
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True, slots=True)
class Place:
    """Where heads go.

    Args:
        folder: Where they are written; created if it does not exist.
        base: The model that they guess for.
        repo_id: Repository on the hub that the folder is uploaded to, if any.
    """

    folder: Path
    base: PreTrainedModel
    repo_id: str | None = None

    @property
    def base_id(self) -> str | None:
        """The base's name, if others can find it by that name."""
        return _hub_id(self.base.config.name_or_path or None)

    @property
    def recorded_base(self) -> str | None:
        """The name that stands in the config: of a local base only where it stays local."""
        return self.base_id if self.repo_id is not None else self.base.config.name_or_path or None


def save_heads(folder: str | Path, proposer: Proposer | None, base: PreTrainedModel) -> None:
    """Write the heads of a proposer, its tree and a model card into a folder.

    Args:
        folder: Created if it does not exist. A card that somebody has written is kept.
        proposer: What to save.
        base: The model that it guesses for.

    Raises:
        OptionError: If the proposer has no heads.
    """
    _save(proposer, Place(Path(folder), base))


def push_heads(
    repo_id: str,
    proposer: Proposer | None,
    base: PreTrainedModel,
    *,
    private: bool | None,
    token: str | None,
) -> str:
    """Upload the heads of a proposer, its tree and a model card to the hub.

    Args:
        repo_id: Repository, made if it does not exist.
        proposer: What to upload.
        base: The model that it guesses for; the path of a local one is not published.
        private: Whether a new repository is private; None for the account's default.
        token: Access token; None for the one that is logged in with.

    Returns:
        The address of the commit.

    Raises:
        OptionError: If the proposer has no heads; nothing is then sent.
    """
    with TemporaryDirectory() as folder:
        _save(proposer, Place(Path(folder), base, repo_id))
        api = HfApi(token=token)
        repo = api.create_repo(repo_id, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo.repo_id, folder_path=folder, commit_message="Upload draft heads"
        )
    return commit.commit_url


def _save(proposer: Proposer | None, place: Place) -> None:
    card = write_proposer(proposer, place)
    path = place.folder / CARD_NAME
    if not path.exists() or _is_generated(path):
        path.write_text(card, encoding="utf-8")


@singledispatch
def write_proposer(proposer: Proposer | None, _place: Place) -> str:
    """Write the files of a proposer's heads, and return the text of their card.

    Kinds of proposers register what writes them.

    Raises:
        OptionError: If the proposer has no heads.
    """
    found = type(proposer).__name__ if proposer is not None else "None"
    raise OptionError(
        f"proposer is {found}, only a MedusaProposer and an EagleProposer have heads to save; an "
        "n-gram proposer has no weights, and a draft model is saved with its own save_pretrained"
    )


@write_proposer.register(MedusaProposer)
def _write_medusa(proposer: MedusaProposer, place: Place) -> str:
    heads, choices = proposer.heads, proposer.config.choices
    checkpoint = MedusaCheckpoint(
        weight=heads.weight.detach(),
        bias=None if heads.bias is None else heads.bias.detach(),
        lm_weight=None if heads.lm_weight is None else heads.lm_weight.detach(),
        vocab_size=heads.config.vocab_size,
        base_name_or_path=place.recorded_base,
        choices=choices,
    )
    write_medusa(place.folder, checkpoint)
    card = MedusaCard(
        num_heads=checkpoint.num_heads,
        num_layers=checkpoint.num_layers,
        has_own_lm_head=checkpoint.has_own_lm_head,
        num_parameters=sum(tensor.numel() for tensor in checkpoint.tensors.values()),
        dtype=str(checkpoint.dtype).removeprefix("torch."),
        num_nodes=None if choices is None else 1 + len(choices),
        base=place.base_id,
        repo_id=place.repo_id,
    )
    return card.render()


@write_proposer.register(EagleProposer)
def _write_eagle(proposer: EagleProposer, place: Place) -> str:
    choices = proposer.config.choices
    checkpoint = eagle_checkpoint(
        proposer.heads, base_name_or_path=place.recorded_base, choices=choices
    ).share(**stored_matrices(place.base))
    num_layers, config = proposer.view.num_layers, checkpoint.config
    write_eagle(place.folder, checkpoint, num_target_layers=num_layers)
    is_eagle3 = config.kind == "eagle3"
    card = EagleCard(
        kind=config.kind,
        num_layers=config.num_layers,
        feature_layers=config.layers_to_read(num_layers) if is_eagle3 else (),
        vocab_size=config.vocab_size,
        draft_vocab_size=config.draft_vocab_size,
        has_own_lm_head=config.has_own_lm_head,
        num_parameters=sum(
            tensor.numel() for tensor in checkpoint.tensors.values() if tensor.is_floating_point()
        ),
        dtype=str(checkpoint.dtype).removeprefix("torch."),
        num_nodes=None if choices is None else 1 + len(choices),
        base=place.base_id,
        repo_id=place.repo_id,
    )
    return card.render()


def _is_generated(card: Path) -> bool:
    if not card.is_file():
        return False
    return GENERATED_MARK in card.read_text(encoding="utf-8", errors="replace")


def _hub_id(name: str | None) -> str | None:
    """Return a base's name if others can find it by that name."""
    is_id = name is not None and _HUB_ID.fullmatch(name) and not Path(name).exists()
    return name if is_id else None
