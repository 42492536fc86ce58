"""From a proposer to a folder of heads with its model card, and to the hub."""

from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import HfApi
from transformers import PreTrainedModel

from speclm.drafting.heads_folder import Destination
from speclm.drafting.interface import Proposer
from speclm.methods.registry import method_of, no_heads


def save_heads(folder: str | Path, proposer: Proposer | None, base: PreTrainedModel) -> None:
    """Write the heads of a proposer, its tree and a model card into a folder.

    Args:
        folder: Created if it does not exist. A card that somebody has written is kept.
        proposer: What to save.
        base: The model that it drafts for; the path of a local one is not written.

    Raises:
        OptionError: If the proposer has no heads.
    """
    _save(proposer, Destination(Path(folder), base))


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
        base: The model that it drafts for; the path of a local one is not published.
        private: Whether a new repository is private; None for the account's default.
        token: Access token; None for the stored one.

    Returns:
        The address of the commit.

    Raises:
        OptionError: If the proposer has no heads; nothing is sent then.
    """
    with TemporaryDirectory() as folder:
        _save(proposer, Destination(Path(folder), base, repo_id))
        api = HfApi(token=token)
        repo = api.create_repo(repo_id, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo.repo_id, folder_path=folder, commit_message="Upload draft heads"
        )
    return commit.commit_url


def _save(proposer: Proposer | None, destination: Destination) -> None:
    method = None if proposer is None else method_of(proposer)
    if proposer is None or method is None:
        raise no_heads(proposer)
    method.save(proposer, destination)
