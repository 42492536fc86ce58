"""``speclm train --cache-features``: announce, confirm and write what a training reads."""

import sys
from contextlib import suppress
from pathlib import Path

import typer
from tqdm.auto import tqdm  # type: ignore[import-untyped]

from speclm.errors import OptionError, UnsupportedModelError
from speclm.training.feature_cache import FeatureCache
from speclm.training.feature_writer import FeaturePlan, plan_features, release_decoder
from speclm.training.heads_trainer import HeadsTrainer
from speclm.training.run_summary import size_text


def use_features(trainer: HeadsTrainer, folder: Path | None, *, is_confirmed: bool) -> None:
    """Write the features of a training as far as they are missing, and let it read them.

    Args:
        trainer: The trainer, whose base cannot run afterwards.
        folder: Folder of the features; None to run the base in every epoch.
        is_confirmed: Whether the disk may be used without a question.

    Raises:
        OptionError: If there is no terminal to ask at, or the recipe trains the base too.
        FeatureError: If the folder has features of another training or other files, or the
            features do not fit on the disk.
        typer.Abort: If the user declines.
    """
    if folder is None:
        return
    args, model = trainer.args, trainer.training_model
    plan = plan_features(model, trainer.cacheable_datasets(), folder)
    if trainer.is_world_process_zero():
        trainer.announce(_line(plan))
    if plan.missing:
        _confirm(plan, is_confirmed=is_confirmed, is_single=args.world_size == 1)
        trainer.accelerator.wait_for_everyone()  # all have looked at the folder
        if trainer.is_world_process_zero():
            plan.prepare()
        trainer.accelerator.wait_for_everyone()
        with tqdm(desc="texts", delay=3.0, disable=None, leave=False) as shown:
            plan.write(
                model,
                batch_size=args.per_device_train_batch_size,
                process=(args.process_index, args.world_size),
                progress=shown.update,
            )
        trainer.accelerator.wait_for_everyone()
    trainer.use_features(FeatureCache(folder))
    with suppress(UnsupportedModelError):  # a decoder of unknown parts stays in memory
        release_decoder(model)


def _line(plan: FeaturePlan) -> str:
    manifest = plan.manifest
    num_all, num_missing = len(manifest.shards), len(plan.missing)
    if not num_missing:
        return f"cached features: all {num_all} files are in {plan.folder}"
    return (
        f"cached features: {size_text(plan.num_bytes)} are to be written to {plan.folder}, "
        f"{num_missing} of {num_all} files ({manifest.num_tokens:,} tokens in all)"
    )


def _confirm(plan: FeaturePlan, *, is_confirmed: bool, is_single: bool) -> None:
    """Ask whether the features may be written, unless that is settled."""
    if is_confirmed:
        return
    if not is_single or sys.stdin is None or not sys.stdin.isatty():
        raise OptionError(
            f"--cache-features would write {size_text(plan.num_bytes)} to {str(plan.folder)!r} and "
            "there is no terminal to ask at, expected a confirmation; pass --yes"
        )
    typer.confirm(f"write {size_text(plan.num_bytes)}?", abort=True, err=True)
