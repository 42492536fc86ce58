"""The checkpoints of a training: which can be resumed from, and by which training."""

import hashlib
import json
import logging
import re
from array import array
from collections.abc import Iterator, Mapping, Sized
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import torch
from transformers import PreTrainedModel, TrainerState, TrainingArguments

from speclm._version import __version__
from speclm.errors import CheckpointError, SpeclmError, reason_of, shown
from speclm.files.atomic import read_json, write_json
from speclm.target import stored_matrices

_log = logging.getLogger("speclm")

RECORD_NAME = "speclm_training.json"
"""File in the output folder with the `RunRecord` of the training."""

_CHECKPOINT_NAME = re.compile(r"checkpoint-(\d+)")
_WRITTEN_LAST = "trainer_state.json"
_MAX_STEPS = 2**31 - 1
_NUM_SAMPLED = 64  # numbers along each dimension of a matrix of the base
_ARGUMENTS = (
    *("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps"),
    *("num_train_epochs", "max_steps", "per_device_train_batch_size"),
    *("gradient_accumulation_steps", "world_size", "optim", "optim_args", "weight_decay"),
    *("adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "bf16", "fp16"),
    *("seed", "data_seed", "train_sampling_strategy"),
)
"""Training arguments that decide the steps."""


@dataclass(frozen=True, slots=True)
class RunRecord:
    """What decides the result of a training, to compare when it is resumed.

    Args:
        data: Hash of the examples; None for a stream.
        num_examples: Their number; None for a stream.
        base: Hash of some numbers of the base's embeddings and output matrix.
        arguments: Training arguments that decide the steps.
        options: Options of the recipe.
        version: Version of speclm; it may differ.
    """

    data: str | None
    num_examples: int | None
    base: str
    arguments: dict[str, Any]
    options: dict[str, Any]
    version: str = __version__

    @classmethod
    def of(
        cls,
        base: PreTrainedModel,
        args: TrainingArguments,
        *,
        dataset: Any,
        options: Mapping[str, Any],
    ) -> Self:
        """Return the record of a training that is about to start."""
        values = {name: getattr(args, name) for name in _ARGUMENTS}
        num_examples = len(dataset) if isinstance(dataset, Sized) else None
        return cls(
            None if num_examples is None else _hash_examples(dataset, num_examples),
            num_examples,
            _hash_base(base),
            _as_json(values),
            _as_json(options),
        )

    def write(self, folder: Path) -> None:
        """Write the record into the output folder of the training."""
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / RECORD_NAME, asdict(self))

    def require_same(self, folder: Path) -> None:
        """Check that the training in a folder is this one; without a record, log that.

        Raises:
            CheckpointError: If it had other data, options or another base, or its record is
                damaged.
        """
        path = folder / RECORD_NAME
        try:
            found: Any = read_json(path)
        except FileNotFoundError:
            _log.warning("%s is missing: whether data and options are the same is unknown", path)
            return
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{path} cannot be read ({reason_of(error)}), expected the record of a training; "
                "delete it if data and options are those that the training began with"
            ) from error
        differences = list(self._differences(found if isinstance(found, dict) else {}))
        if differences:
            raise CheckpointError(
                f"{folder}: the training to resume differs: {'; '.join(differences)}; resume with "
                "what it began with, or train in another folder"
            )

    def _differences(self, found: dict[str, Any]) -> Iterator[str]:
        if (found.get("data"), found.get("num_examples")) != (self.data, self.num_examples):
            yield (
                f"the data was {found.get('num_examples')} examples with the hash "
                f"{str(found.get('data'))[:8]} and is {self.num_examples} with "
                f"{str(self.data)[:8]}"
            )
        if found.get("base") != self.base:
            yield "the base has other weights"
        for part in ("arguments", "options"):
            mine, theirs = getattr(self, part), found.get(part)
            before: dict[str, Any] = theirs if isinstance(theirs, dict) else {}
            for name in [*mine, *(name for name in before if name not in mine)]:
                if before.get(name) != mine.get(name):
                    was, now = shown(before.get(name)), shown(mine.get(name))
                    yield f"{name} was {was} and is {now}"


def _as_json(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return values as they read back from JSON."""
    written: dict[str, Any] = json.loads(json.dumps(dict(values), default=str))
    return written


def _hash_examples(dataset: Any, num_examples: int) -> str:
    digest = hashlib.sha256()
    for index in range(num_examples):
        example = dataset[index]
        for name in ("input_ids", "loss_mask"):
            numbers = array("q", example[name])
            digest.update(len(numbers).to_bytes(8))
            digest.update(numbers)
    return digest.hexdigest()


@torch.no_grad()
def _hash_base(base: PreTrainedModel) -> str:
    """Hash some numbers of the base's matrices; those that are quantised or offloaded are left out.

    They are rounded to bfloat16, so that the type in which the base is loaded does not matter.
    """
    digest = hashlib.sha256()
    for weight in stored_matrices(base).values():
        if weight is None or not weight.is_floating_point() or weight.device.type == "meta":
            continue
        part = weight.detach()
        for dim, size in enumerate(weight.shape):
            spread = [size * index // _NUM_SAMPLED for index in range(_NUM_SAMPLED)]
            indices = torch.tensor(spread, dtype=torch.long, device=weight.device)
            part = part.index_select(dim, indices)
        rounded = part.to(torch.bfloat16).contiguous().view(torch.int16).cpu()
        digest.update(bytes(rounded.numpy().tobytes()))
    return digest.hexdigest()


def last_complete_checkpoint(folder: str | Path) -> Path | None:
    """Return the newest complete checkpoint in the output folder of a training, if any.

    `Trainer` writes its state last. A checkpoint whose state is missing, truncated or of another
    step was being written when the process ended, and is skipped with a log line.
    """
    found = {
        int(match[1]): path
        for path in Path(folder).glob("checkpoint-*")
        if (match := _CHECKPOINT_NAME.fullmatch(path.name))
    }
    for step in sorted(found, reverse=True):
        if _is_complete(found[step], step):
            return found[step]
        _log.warning("%s is incomplete; resuming from an older checkpoint", found[step])
    return None


def _is_complete(checkpoint: Path, step: int) -> bool:
    try:
        state = read_json(checkpoint / _WRITTEN_LAST)
    except (OSError, ValueError):
        return False
    return isinstance(state, dict) and state.get("global_step") == step


@contextmanager
def reading_checkpoint(folder: str | Path) -> Iterator[None]:
    """Turn Python's errors while `Trainer` reads a checkpoint into a `CheckpointError`."""
    try:
        yield
    except (SpeclmError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise CheckpointError(
            f"{folder}: the checkpoint cannot be read ({reason_of(error)}), expected one as the "
            "training wrote it; resume from an older one, or start anew"
        ) from error


def require_state(folder: str | Path) -> None:
    """Check the saved state of a checkpoint before `Trainer` reads it.

    Raises:
        CheckpointError: If it is missing or not in the form that `Trainer` writes.
    """
    path = Path(folder) / _WRITTEN_LAST
    with reading_checkpoint(folder):
        state: Any = TrainerState(**read_json(path))
    is_usable = (
        type(state.global_step) is int
        and 0 <= state.global_step <= _MAX_STEPS
        and isinstance(state.best_model_checkpoint, str | None)
        and isinstance(state.stateful_callbacks, dict)
    )
    if not is_usable:
        raise CheckpointError(
            f"{path}: global_step is {shown(state.global_step)} and best_model_checkpoint "
            f"{shown(state.best_model_checkpoint)}, expected a number of steps and a folder or "
            "null; resume from an older checkpoint"
        )


def other_heads(folder: str, difference: str) -> CheckpointError:
    """Return the error for a checkpoint of other heads."""
    return CheckpointError(
        f"{folder}: the checkpoint holds other heads than those in training ({difference}); resume "
        "with the options that the training began with, or train in another folder"
    )
