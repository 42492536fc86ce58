"""Trains Medusa heads on a frozen base with Transformers' `Trainer`."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch.utils.data import Dataset
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments
from typing_extensions import override

from speclm.formats import MedusaCheckpoint, hub_id, write_medusa
from speclm.heads import MedusaHeads, MedusaHeadsConfig
from speclm.proposers.medusa import STATIC_TREE, MedusaProposer
from speclm.target import TargetView, output_matrix
from speclm.training.guess_meter import GuessMeter
from speclm.training.heads_trainer import HeadsTrainer, place_base
from speclm.training.medusa_model import MedusaObjective, MedusaTrainingModel
from speclm.training.rows import EvalRows, Item
from speclm.tree.choices import trim_choices


def new_medusa_heads(
    base: PreTrainedModel,
    *,
    num_heads: int = 5,
    num_layers: int = 1,
    has_own_lm_head: bool = False,
    seed: int = 0,
) -> MedusaHeads:
    """Return untrained heads for a base, in float32 and on its device.

    Args:
        base: The target; it gives width and vocabulary.
        num_heads: Heads.
        num_layers: Residual layers of each.
        has_own_lm_head: Whether each head gets an output matrix of its own, which starts as a
            copy of the base's. It guesses better and is as large as the base's.
        seed: Of the random weights of all layers but the first.

    Raises:
        UnsupportedModelError: If the base's output matrix is to be copied, and is quantised or
            offloaded.
    """
    view = TargetView(base)
    config = MedusaHeadsConfig(
        hidden_size=view.hidden_size,
        vocab_size=view.vocab_size,
        num_heads=num_heads,
        num_layers=num_layers,
        has_own_lm_head=has_own_lm_head,
    )
    heads = MedusaHeads(config, dtype=torch.float32, device=view.device)
    heads.init_weights_(
        output_matrix(base) if has_own_lm_head else None,
        generator=torch.Generator().manual_seed(seed),
    )
    return heads


class MedusaTrainer(HeadsTrainer):
    """A `Trainer` whose model is Medusa heads on a frozen base.

    Logs loss and top-1, 2 and 3 accuracy of each head and ``estimated_tau``, the tokens a round
    that decoding texts like the data would have.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        heads: MedusaHeads,
        args: TrainingArguments,
        *,
        train_dataset: Dataset[Item],
        eval_dataset: EvalRows | None = None,
        objective: MedusaObjective | None = None,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:
        """Prepare a training.

        Args:
            base: The target. It is frozen, put into eval mode and, unless it was loaded with a
                device map, moved to the device of `args`.
            heads: Heads to train, see `new_medusa_heads`.
            args: As `training_arguments` makes them.
            train_dataset: Rows, see `load_rows`.
            eval_dataset: Rows that ``args.eval_strategy`` evaluates on, or several such by name.
            objective: What the heads are trained for; None for the defaults.
            callbacks: Callbacks beside `Trainer`'s own.

        Raises:
            VocabularyMismatchError: If the heads were made for another vocabulary.
            OptionError: If the heads have another width than the base.
            DataError: If a row has nothing to learn, or more tokens than the base was built for.
        """
        place_base(base, args)
        MedusaProposer(heads, target=base)  # checks that they fit
        # The same for all heads, whatever they will draft, so that estimates compare.
        choices = trim_choices(STATIC_TREE, max_depth=heads.num_heads)
        super().__init__(
            MedusaTrainingModel(base, heads, objective=objective or MedusaObjective()),
            args,
            make_meter=partial(GuessMeter, choices, num_guesses=heads.num_heads, name="head"),
            max_length=TargetView(base).max_positions,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            callbacks=callbacks,
        )
        self.heads = heads
        self._base_id = hub_id(base.config.name_or_path)

    @override
    def _write(self, folder: Path) -> None:
        checkpoint = MedusaCheckpoint(
            **self.heads.state_dict(),
            vocab_size=self.heads.config.vocab_size,
            base_name_or_path=self._base_id,
        )
        write_medusa(folder, checkpoint)
