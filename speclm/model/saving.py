"""From a proposer to a folder of heads, with its model card, and to the hub."""

from dataclasses import dataclass
from functools import singledispatch
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import HfApi
from transformers import PreTrainedModel

from speclm.cards import GENERATED_MARK
from speclm.drafting.heads_folder import CARD_NAME, hub_id
from speclm.drafting.interface import Proposer
from speclm.errors import OptionError
from speclm.methods.eagle.card import EagleCard
from speclm.methods.eagle.network import eagle_checkpoint
from speclm.methods.eagle.proposer import EagleProposer
from speclm.methods.eagle.writer import write_eagle
from speclm.methods.medusa.card import MedusaCard
from speclm.methods.medusa.checkpoint import MedusaCheckpoint, write_medusa
from speclm.methods.medusa.proposer import MedusaProposer
from speclm.target import stored_matrices


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
        """The base's name, if others can find it by that name; paths are not written."""
        return hub_id(self.base.config.name_or_path)

    def card(self, text: str) -> str | None:
        """Return the text of the card if it is to be written; None where somebody has their own."""
        path = self.folder / CARD_NAME
        return text if not path.exists() or _is_generated(path) else None


def save_heads(folder: str | Path, proposer: Proposer | None, base: PreTrainedModel) -> None:
    """Write the heads of a proposer, its tree and a model card into a folder.

    Args:
        folder: Created if it does not exist. A card that somebody has written is kept.
        proposer: What to save.
        base: The model that it guesses for; the path of a local one is not written.

    Raises:
        OptionError: If the proposer has no heads.
    """
    write_proposer(proposer, Place(Path(folder), base))


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
        write_proposer(proposer, Place(Path(folder), base, repo_id))
        api = HfApi(token=token)
        repo = api.create_repo(repo_id, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo.repo_id, folder_path=folder, commit_message="Upload draft heads"
        )
    return commit.commit_url


@singledispatch
def write_proposer(proposer: Proposer | None, _place: Place) -> None:
    """Write the files of a proposer's heads, and their card.

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
def _write_medusa(proposer: MedusaProposer, place: Place) -> None:
    heads, choices = proposer.heads, proposer.config.paths
    checkpoint = MedusaCheckpoint(
        weight=heads.weight.detach(),
        bias=None if heads.bias is None else heads.bias.detach(),
        lm_weight=None if heads.lm_weight is None else heads.lm_weight.detach(),
        vocab_size=heads.config.vocab_size,
        base_name_or_path=place.base_id,
        choices=choices,
    )
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
    write_medusa(place.folder, checkpoint, card=place.card(card.render()))


@write_proposer.register(EagleProposer)
def _write_eagle(proposer: EagleProposer, place: Place) -> None:
    choices = proposer.config.paths
    checkpoint = eagle_checkpoint(
        proposer.heads, base_name_or_path=place.base_id, choices=choices
    ).share(**stored_matrices(place.base))
    num_layers, config = proposer.view.num_layers, checkpoint.config
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
    text = place.card(card.render())
    write_eagle(place.folder, checkpoint, num_target_layers=num_layers, card=text)


def _is_generated(card: Path) -> bool:
    if not card.is_file():
        return False
    return GENERATED_MARK in card.read_text(encoding="utf-8", errors="replace")
