"""Trains EAGLE heads on a frozen base with Transformers' `Trainer`."""

from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments
from typing_extensions import override

from speclm.config import require_count
from speclm.drafting.heads_folder import hub_id
from speclm.errors import OptionError
from speclm.methods.eagle.checkpoint import eagle_checkpoint, write_eagle
from speclm.methods.eagle.config import EagleConfig
from speclm.methods.eagle.network import EagleHeads
from speclm.methods.eagle.objective import EagleObjective, EagleTrainingModel
from speclm.methods.eagle.proposer import EagleProposer
from speclm.methods.registry import find_heads
from speclm.target import TargetView, output_matrix
from speclm.training.guess_meter import GuessMeter
from speclm.training.heads_trainer import HeadsTrainer, place_base
from speclm.training.rows import EvalRows, Item


def new_eagle_heads(
    base: PreTrainedModel,
    *,
    kind: str,
    columns: Int[Tensor, " draft_vocab"] | None = None,
    feature_layers: tuple[int, ...] | None = None,
    num_layers: int = 1,
    seed: int = 0,
) -> EagleHeads:
    """Return untrained heads for a base, in float32 and on its device.

    Embeddings are the base's. The output matrix of EAGLE-3 starts as the base's rows of the draft
    vocabulary.

    Args:
        base: The target; it gives all sizes.
        kind: ``"eagle"`` (EAGLE-1 and 2) or ``"eagle3"``.
        columns: The target's tokens that heads of EAGLE-3 may guess, increasing, see
            `choose_columns`; None for all.
        feature_layers: Hidden states that EAGLE-3 reads; None for the usual ones.
        num_layers: Decoder layers of the heads.
        seed: Of the random weights.

    Raises:
        OptionError: If the base has too few layers for the usual hidden states, or a number is out
            of range.
        UnsupportedModelError: If the heads get a copy of the base's output matrix, which is
            quantised or offloaded.
    """
    config = EagleConfig.from_model_config(
        base.config,
        kind=kind,
        draft_vocab_size=None if columns is None else len(columns),
        feature_layers=feature_layers,
        num_layers=num_layers,
    )
    view = TargetView(base)
    heads = EagleHeads(config, dtype=torch.float32, device=view.device)
    if columns is not None and config.has_draft_vocab:
        heads.set_draft_columns_(columns.to(view.device))
    generator = torch.Generator().manual_seed(seed)
    lm_weight = None if heads.lm_head is None else output_matrix(base)
    heads.init_weights_(lm_weight=lm_weight, generator=generator)
    return heads


def load_eagle_heads(
    base: PreTrainedModel, heads: str | Path, *, revision: str | None = None
) -> EagleHeads:
    """Return saved heads to go on training, in float32 and on the base's device.

    They keep their numbers and their draft vocabulary. Matrices that are copies of the base's are
    dropped.

    Args:
        base: The target.
        heads: Folder or hub id.
        revision: Branch, tag or commit on the hub; None for the main branch.

    Raises:
        OptionError: If they are no EAGLE heads, or have another width than the base.
        VocabularyMismatchError: If they were made for another vocabulary.
        CheckpointError: If they are damaged or incomplete.
    """
    options: dict[str, Any] = {"dtype": torch.float32}
    if revision is not None:
        options["revision"] = revision
    source = find_heads(heads, options)
    proposer = source.method.load(source, base)
    if not isinstance(proposer, EagleProposer):
        raise OptionError(
            f"heads {str(heads)!r} are those of a {type(proposer).__name__}, expected EAGLE heads; "
            "name a folder or hub id of such"
        )
    return proposer.heads.requires_grad_(requires_grad=True)


class EagleTrainer(HeadsTrainer):
    """A `Trainer` whose model is EAGLE heads on a frozen base.

    Logs loss and top-1, 2 and 3 accuracy of each step, all guesses before being right, and
    ``estimated_tau``, the tokens a round that decoding texts like the data would have, with as
    many guesses in a row as there are steps.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        heads: EagleHeads,
        args: TrainingArguments,
        *,
        train_dataset: Dataset[Item],
        eval_dataset: EvalRows | None = None,
        objective: EagleObjective | None = None,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:
        """Prepare a training.

        Args:
            base: The target. It is frozen, put into eval mode and, unless it was loaded with a
                device map, moved to the device of `args`.
            heads: Heads to train, see `new_eagle_heads` and `load_eagle_heads`.
            args: As `training_arguments` makes them, with `EAGLE_DEFAULTS`.
            train_dataset: Rows, see `load_rows`.
            eval_dataset: Rows that ``args.eval_strategy`` evaluates on, or several such by name.
            objective: What the heads are trained for; None for what is usual for their kind.
            callbacks: Callbacks next to `Trainer`'s own.

        Raises:
            VocabularyMismatchError: If the heads were made for another vocabulary.
            OptionError: If the heads have another width than the base.
            DataError: If a row has nothing to learn, or more tokens than base and heads were built
                for.
        """
        place_base(base, args)
        EagleProposer(heads, target=base)  # checks that they fit
        self._view = TargetView(base)
        objective = objective or EagleObjective.usual(heads.config.kind)
        num_guesses = objective.num_measured
        chain = tuple((0,) * depth for depth in range(1, num_guesses + 1))
        bounds = (self._view.max_positions, heads.config.max_position_embeddings)
        super().__init__(
            EagleTrainingModel(base, heads, objective=objective),
            args,
            make_meter=partial(GuessMeter, chain, num_guesses=num_guesses, name="step"),
            max_length=min(bound for bound in bounds if bound is not None),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            callbacks=callbacks,
        )
        self.heads = heads

    @override
    def _write(self, folder: Path) -> None:
        base_id = hub_id(self._view.model.config.name_or_path)  # paths are not written
        checkpoint = eagle_checkpoint(self.heads, base_name_or_path=base_id)
        write_eagle(folder, checkpoint, num_target_layers=self._view.num_layers)


def count_tokens(rows: Iterable[Item], *, vocab_size: int) -> Int[Tensor, " vocab"]:
    """Count the tokens that the loss counts.

    Args:
        rows: The training set.
        vocab_size: Width of the target's logits.

    Raises:
        OptionError: If a row has a token outside the vocabulary.
    """
    counts = torch.zeros(vocab_size, dtype=torch.int64, device="cpu")
    for index, row in enumerate(rows):
        tokens = torch.tensor(row["input_ids"], dtype=torch.long, device="cpu")
        counted = tokens[torch.tensor(row["loss_mask"], dtype=torch.bool, device="cpu")]
        if len(counted) and int(counted.max()) >= vocab_size:
            raise OptionError(
                f"row {index} has token {int(counted.max())}, expected ids below {vocab_size}, the "
                "target's vocabulary; tokenize with the target's own tokenizer"
            )
        counts += torch.bincount(counted, minlength=vocab_size)
    return counts


def choose_columns(counts: Int[Tensor, " vocab"], size: int) -> Int[Tensor, " draft_vocab"]:
    """Return the `size` most frequent tokens in the order of their ids.

    Where fewer occur, the lowest other ids fill up.

    Args:
        counts: Result of `count_tokens`.
        size: Tokens to choose.

    Raises:
        OptionError: If there are not as many.

    Example:
        >>> choose_columns(torch.tensor([0, 5, 0, 9, 1]), 3).tolist()
        [1, 3, 4]
    """
    require_count("draft_vocab_size", size, low=1, high=len(counts))
    order = counts.argsort(descending=True, stable=True)
    return order[:size].sort().values
