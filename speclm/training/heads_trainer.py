"""The trainer of all heads: Transformers' `Trainer` around a `TrainingModel`."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_utils import EvalLoopOutput, TrainOutput
from typing_extensions import override

from speclm.errors import FeatureError, NumericalError
from speclm.training._callbacks import Announcement, EpochOrder, TauProgress
from speclm.training._resuming import ResumingTrainer
from speclm.training.checkpoints import RunRecord, last_complete_checkpoint, require_state
from speclm.training.conversations import Example
from speclm.training.dataset import (
    EvalDataset,
    PaddedExamples,
    collate_examples,
    eval_sampler,
    require_trainable,
    train_sampler,
)
from speclm.training.feature_cache import STATES, FeatureCache, distinct_texts
from speclm.training.partitions import heads_whole, is_divided, place_base, whole_parameters
from speclm.training.run_summary import (
    Agreement,
    RunSummary,
    measure_agreement,
    summarize,
)
from speclm.training.training_model import TrainingModel, split_groups_

_log = logging.getLogger("speclm")


class HeadsTrainer(ResumingTrainer):
    """A `Trainer` whose model is heads on a frozen base.

    Before the first step it announces what is trained, on what, and how far the data agrees with
    the base. It logs the loss and the top-1, 2 and 3 accuracy of each draft token, and
    ``estimated_tau``: the tokens per target forward when generating texts like the data. It resumes
    from the newest complete checkpoint of the same training, and stops with an error if the loss is
    not a number.

    Attributes:
        announce: Takes each line of what is said before the first step; logs it by default.
        options: Options of the recipe that a resumed training must have too, by name.
        heads: The heads in training.
    """

    options: Mapping[str, Any]

    def __init__(
        self,
        model: TrainingModel,
        args: TrainingArguments,
        *,
        train_dataset: Dataset[Example],
        eval_dataset: EvalDataset | None = None,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:
        """Check the data and move the base to the device of training.

        Args:
            model: Heads and base. Unless the base was loaded with a device map, it is moved to the
                device of `args`.
            args: Result of `training_arguments`.
            train_dataset: Examples, see `load_examples`.
            eval_dataset: Examples that ``args.eval_strategy`` evaluates on, or several sets of
                them by name.
            callbacks: Callbacks in addition to `Trainer`'s own.

        Raises:
            DataError: If an example has no token to learn, or too many tokens.
        """
        named = eval_dataset.values() if isinstance(eval_dataset, dict) else (eval_dataset,)
        datasets: tuple[Any, ...] = (train_dataset, *named)
        for dataset in datasets:
            if isinstance(dataset, Sized):  # a stream cannot be checked in advance
                require_trainable(dataset, max_length=model.max_length)
        place_base(model.view, args)
        self.announce, self.options = _log.info, {}
        self.heads, self.training_model = model.heads, model
        self._collate: Callable[[Sequence[Example]], dict[str, Tensor]] = collate_examples
        self._order = EpochOrder()
        self._meters = {is_training: model.new_meter() for is_training in (False, True)}
        self._figures: dict[bool, dict[str, Tensor]] = {False: {}, True: {}}  # sums and counts
        with heads_whole(args):
            super().__init__(
                model=model,
                args=args,
                data_collator=collate_examples,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                callbacks=[Announcement(self), self._order, *callbacks],
            )
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(TauProgress())

    @override
    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Train.

        Args:
            resume_from_checkpoint: Folder of a checkpoint; True for the newest complete one in the
                output folder, or a new start if there is none.
            trial: As in `Trainer`.
            ignore_keys_for_eval: As in `Trainer`.

        Raises:
            NumericalError: If the loss is not a number.
            CheckpointError: If the checkpoint holds other heads or is of a training with other
                data, options or base, or cannot be read.
        """
        if resume_from_checkpoint is True:
            found = last_complete_checkpoint(str(self.args.output_dir))
            _log.warning("resuming from %s", found or "nothing: no complete checkpoint was found")
            resume_from_checkpoint = None if found is None else str(found)
        if isinstance(resume_from_checkpoint, str):
            require_state(resume_from_checkpoint)
            self.record().require_same(Path(resume_from_checkpoint).parent)
        with heads_whole(self.args):
            return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)

    def record(self) -> RunRecord:
        """Return what decides the result of this training, except the heads' first weights."""
        return RunRecord.of(
            self.training_model.view.model,
            self.args,
            dataset=self.train_dataset,
            options=self.options,
        )

    def summary(self) -> RunSummary:
        """Return what is trained and on what; the number of steps is known in `train`."""
        return summarize(
            self.training_model,
            self.args,
            dataset=self.train_dataset,
            num_steps=self.state.max_steps,
        )

    def agreement(self) -> Agreement | None:
        """Return how far a sample of the data agrees with the base; None for a stream.

        It takes a few forwards of the base, and at most about twenty seconds, except of a divided
        base, which all processes must run together.
        """
        limit = {"clock": lambda: 0.0} if self.has_divided_base else {}
        return measure_agreement(
            self.training_model,
            self.train_dataset,
            batch_size=self.args.per_device_train_batch_size,
            collate=self._collate,
            **limit,
        )

    @property
    def has_divided_base(self) -> bool:
        """Whether all processes run the base together, see `place_base`."""
        return is_divided(self.training_model.view.model)

    def use_features(self, cache: FeatureCache) -> None:
        """Read hidden states from a cache instead of running the base.

        Args:
            cache: The features of all data of this training, see `plan_features`.

        Raises:
            FeatureError: If the cache has other hidden states, or lacks a text of the data.
        """
        layers = self.training_model.layers_read
        if cache.manifest.layers != layers:
            raise FeatureError(
                f"the cached features are the hidden states {cache.manifest.layers}, expected "
                f"{layers}, which these heads read; cache them in another folder"
            )
        cache.require(distinct_texts(self.cacheable_datasets()))
        self.data_collator = self._collate = cache.collate

    def cacheable_datasets(self) -> list[Any]:
        """Return all sets of examples of this training."""
        named = self.eval_dataset
        evaluated = [*named.values()] if isinstance(named, dict) else [named]
        return [dataset for dataset in (self.train_dataset, *evaluated) if dataset is not None]

    @override
    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(model)
        factors = self.training_model.rate_factors
        if is_new and factors:
            split_groups_(optimizer, factors, self.training_model)
        return optimizer

    @override
    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """Return the batches of an optimizer step, and the number of targets in them.

        The number is that of all processes divided by their number, because they average.
        """
        is_open = self.state.global_step < self.state.max_steps  # else it was resumed at its end
        samples, _ = super().get_batch_samples(epoch_iterator, num_batches * is_open, device)
        return samples, self._count_targets(samples)

    def _count_targets(self, batches: Sequence[dict[str, Any]]) -> Tensor | None:
        counts = [self.training_model.count_targets(batch["loss_mask"]) for batch in batches]
        found = [count for count in counts if count is not None]
        if not found or len(found) < len(batches):
            return None
        total = torch.stack(found).sum(0).to(self.args.device)
        return cast("Tensor", self.accelerator.reduce(total, reduction="mean"))

    @override
    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        if isinstance(num_items_in_batch, Tensor):
            counts = self.training_model.count_targets(inputs["loss_mask"])
            assert counts is not None
            total = num_items_in_batch.clamp(min=1 / self.args.world_size)
            inputs = {**inputs, "shares": counts / total.to(counts)}
        states = inputs.get(STATES)
        inputs = {name: value for name, value in inputs.items() if name != STATES}
        with self.training_model.given_states(states):
            outputs = model(**inputs)
        loss: Tensor = outputs["loss"]
        if not loss.isfinite():  # Trainer reads the loss of every step too
            raise NumericalError(
                f"loss of step {self.state.global_step + 1} is {loss.item()}, expected a finite "
                "number; lower the learning rate, or train in float32 or bf16 instead of fp16"
            )
        self._meters[model.training].add(
            **{name: outputs[name] for name in ("loss_sums", "counts", "ranks", "base_tokens")},
            tokens=inputs["input_ids"].to(outputs["base_tokens"].device),
            loss_mask=outputs.get("loss_mask", inputs["loss_mask"]),
            tree_lengths=outputs.get("tree_lengths"),
        )
        figures = self._figures[model.training]
        for name, pair in outputs.get("figures", {}).items():
            figures[name] = figures.get(name, 0.0) + pair.detach().cpu().double()
        return (loss, outputs) if return_outputs else loss

    @override
    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        num_targets = self._count_targets([inputs]) if self.args.world_size > 1 else None
        with torch.no_grad(), self.compute_loss_context_manager():
            loss: Tensor = self.compute_loss(
                model, self._prepare_inputs(inputs), num_items_in_batch=num_targets
            )
        if self.args.world_size > 1:  # that of the batches of all processes
            loss = self.accelerator.reduce(loss, reduction="mean")
        return loss, None, None  # the logits of all draft tokens would fill the memory

    @override
    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        self._drain(is_training=False)  # leftovers of an interrupted evaluation
        output = super().evaluation_loop(*args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", "eval")
        figures = self._drain(is_training=False)
        named = {f"{prefix}_{name}": value for name, value in figures.items()}
        return output._replace(metrics={**(output.metrics or {}), **named})

    @override
    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        # The summary at the end covers the steps since the last log, which may be all of them.
        if "loss" in logs or "train_loss" in logs:
            logs = {**logs, **self._drain(is_training=True)}
        super().log(logs, start_time)

    def _drain(self, *, is_training: bool) -> dict[str, float]:
        def add_processes(sums: Tensor) -> Tensor:
            total: Tensor = self.accelerator.reduce(sums.to(self.args.device), reduction="sum")
            return total

        figures = self._meters[is_training].drain(add_processes)
        for name, pair in self._figures[is_training].items():
            total, count = add_processes(pair.float()).tolist()
            if count:
                figures[name] = total / count
        self._figures[is_training] = {}
        return figures

    def any_process(self, *, is_true: bool) -> bool:
        """Return whether something is true in any process of the training; all must call it."""
        if self.args.world_size == 1:
            return is_true
        told = torch.tensor(float(is_true), dtype=torch.float32, device=self.args.device)
        return bool(self.accelerator.reduce(told, reduction="sum") > 0)

    @override
    def get_train_dataloader(self) -> DataLoader[Any]:
        own: Any = self.train_dataset
        self.train_dataset = self._padded(own)
        try:
            return super().get_train_dataloader()
        finally:
            self.train_dataset = own

    @override
    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        named: Any = self.eval_dataset
        chosen = named if eval_dataset is None else eval_dataset
        padded = self._padded(named[chosen] if isinstance(chosen, str) else chosen)
        return super().get_eval_dataloader(padded)

    def _padded(self, dataset: Any) -> Any:
        is_padded = self.args.world_size > 1 and isinstance(dataset, Sized)
        return PaddedExamples(dataset) if is_padded else dataset

    @override
    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int] | None:
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        sampler = train_sampler(dataset, self.args, usual=super()._get_train_sampler)
        self._order.sampler = sampler
        return sampler

    @override
    def _get_eval_sampler(self, eval_dataset: Any) -> Sampler[int] | None:
        return eval_sampler(eval_dataset, self.args)

    @override
    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the heads into a folder that ``SpecModel.from_pretrained`` loads.

        Args:
            output_dir: The folder; None for that of the training arguments.
            _internal_call: Whether `Trainer` calls. If it also passes a folder, that folder is a
                checkpoint and gets the state for resuming instead.

        Raises:
            CheckpointError: If the files read back differently.
        """
        if _internal_call and output_dir is not None:
            super().save_model(output_dir, _internal_call)
            return
        with whole_parameters(self.training_model):
            if self.args.should_save:
                self.training_model.write(Path(output_dir or str(self.args.output_dir)))
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Upload heads")
