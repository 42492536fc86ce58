"""From a proposer to a folder of heads, with its model card, and to the hub."""

import re
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import HfApi
from transformers import PreTrainedModel

from speclm.cards import GENERATED_MARK, MedusaCard
from speclm.errors import OptionError
from speclm.formats import MedusaCheckpoint, write_medusa
from speclm.proposers.interface import Proposer
from speclm.proposers.medusa import MedusaProposer

CARD_NAME = "README.md"
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def save_heads(folder: str | Path, proposer: Proposer | None, base: PreTrainedModel) -> None:
    """Write the heads of a proposer, its tree and a model card into a folder.

    Args:
        folder: Created if it does not exist. A card that somebody has written is kept.
        proposer: What to save.
        base: The model that it guesses for.

    Raises:
        OptionError: If the proposer has no heads.
    """
    _save(Path(folder), proposer, base, repo_id=None)


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
        _save(Path(folder), proposer, base, repo_id=repo_id)
        api = HfApi(token=token)
        repo = api.create_repo(repo_id, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo.repo_id, folder_path=folder, commit_message="Upload Medusa heads"
        )
    return commit.commit_url


def _save(
    folder: Path, proposer: Proposer | None, base: PreTrainedModel, *, repo_id: str | None
) -> None:
    if not isinstance(proposer, MedusaProposer):
        found = type(proposer).__name__ if proposer is not None else "None"
        raise OptionError(
            f"proposer is {found}, only a MedusaProposer has heads to save; an n-gram proposer has "
            "no weights, and a draft model is saved with its own save_pretrained"
        )
    name = base.config.name_or_path or None
    heads, choices = proposer.heads, proposer.config.choices
    checkpoint = MedusaCheckpoint(
        weight=heads.weight.detach(),
        bias=None if heads.bias is None else heads.bias.detach(),
        lm_weight=None if heads.lm_weight is None else heads.lm_weight.detach(),
        vocab_size=heads.config.vocab_size,
        base_name_or_path=name if repo_id is None else _hub_id(name),
        choices=choices,
    )
    write_medusa(folder, checkpoint)
    card = MedusaCard(
        num_heads=checkpoint.num_heads,
        num_layers=checkpoint.num_layers,
        has_own_lm_head=checkpoint.has_own_lm_head,
        num_parameters=sum(tensor.numel() for tensor in checkpoint.tensors.values()),
        dtype=str(checkpoint.dtype).removeprefix("torch."),
        num_nodes=None if choices is None else 1 + len(choices),
        base=_hub_id(name),
        repo_id=repo_id,
    )
    path = folder / CARD_NAME
    if not path.exists() or _is_generated(path):
        path.write_text(card.render(), encoding="utf-8")


def _is_generated(card: Path) -> bool:
    if not card.is_file():
        return False
    return GENERATED_MARK in card.read_text(encoding="utf-8", errors="replace")


def _hub_id(name: str | None) -> str | None:
    """Return a base's name if others can find it by that name."""
    is_id = name is not None and _HUB_ID.fullmatch(name) and not Path(name).exists()
    return name if is_id else None
