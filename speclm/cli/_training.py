"""The work of ``speclm train``: checks, loading, the training and its final table."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from transformers import TrainingArguments

from speclm.cli._files import require_folder_to_write
from speclm.cli._models import load
from speclm.cli.train import MAX_LENGTH, TrainOptions
from speclm.config import require_positive
from speclm.errors import OptionError, SpeclmError
from speclm.methods.registry import Method, Recipe
from speclm.training.acceptance_meter import MAX_TOP
from speclm.training.arguments import parse_settings, training_arguments
from speclm.training.dataset import ExampleDataset, load_examples
from speclm.training.heads_trainer import HeadsTrainer

_EVALUATION = "eval_"


def train(method: Method, recipe: Recipe, own: Any, options: TrainOptions) -> None:
    """Train heads, write them and print how well they draft.

    Args:
        method: Method of the recipe.
        recipe: Recipe of the training.
        own: Options of the recipe.
        options: Options of every training.

    Raises:
        OptionError: If an option is out of range, or the folder belongs to another training.
        CheckpointError: If the folder holds another model.
    """
    arguments = _check(method, recipe, options)
    loaded = load(options)
    known: int | None = getattr(loaded.base.config, "max_position_embeddings", None)
    length = options.max_length or min(known or MAX_LENGTH, MAX_LENGTH)
    dataset = load_examples(
        options.data, loaded.tokenizer, limit=options.limit, seed=options.seed, max_length=length
    )
    eval_dataset = None
    if options.eval_data is not None:
        eval_dataset = load_examples(options.eval_data, loaded.tokenizer, max_length=length)
    trainer: HeadsTrainer | None = None
    try:
        trainer = recipe.trainer(
            loaded.base, arguments, options=own, train_dataset=dataset, eval_dataset=eval_dataset
        )
        trainer.train(resume_from_checkpoint=options.resume)
    except (SpeclmError, MemoryError):
        raise
    except Exception as error:
        has_begun = trainer is not None and trainer.state.global_step > 0
        if has_begun or (not options.training_arg and options.report_to == "none"):
            raise
        # Trainer checks most fields at once, and some only when it uses them.
        raise OptionError(
            f"training cannot begin with --training-arg {options.training_arg or []!r} and "
            f"--report-to {options.report_to!r} ({type(error).__name__}: {error}); correct or drop "
            "the one that this is about"
        ) from error
    _finish(trainer, options, eval_dataset)


def _check(method: Method, recipe: Recipe, options: TrainOptions) -> TrainingArguments:
    """Check the options before anything is loaded; return them as training arguments."""
    out = options.out
    method.require_writable(out)
    if not options.resume and any(out.glob("checkpoint-*")):
        raise OptionError(
            f"--out {str(out)!r} holds checkpoints of another training; pass --resume to go on, "
            "or another folder"
        )
    require_positive("--epochs", options.epochs)
    require_positive("--learning-rate", options.learning_rate)
    if options.device is not None and ":" in options.device:
        raise OptionError(
            f"--device is {options.device!r}, expected a kind of device such as cpu or cuda; "
            "choose one of several with CUDA_VISIBLE_DEVICES"
        )
    require_folder_to_write("--out", out)
    settings = {
        "num_train_epochs": options.epochs,
        "learning_rate": options.learning_rate,
        "per_device_train_batch_size": options.batch_size,
        "per_device_eval_batch_size": options.batch_size,
        "eval_strategy": "epoch" if options.eval_data else "no",
        "seed": options.seed,
        "report_to": options.report_to.split(","),
        "use_cpu": options.device == "cpu",
        **parse_settings(options.training_arg or []),
    }
    return training_arguments(out, settings, defaults=recipe.defaults)


def _finish(
    trainer: HeadsTrainer, options: TrainOptions, eval_dataset: ExampleDataset | None
) -> None:
    """Evaluate the heads unless the last step did, write them and print their figures."""
    state = trainer.state
    is_evaluated = any(
        log.get("step") == state.global_step and f"{_EVALUATION}loss" in log
        for log in state.log_history
    )
    if eval_dataset is not None and (trainer.args.load_best_model_at_end or not is_evaluated):
        trainer.evaluate()
    trainer.save_model()
    if not trainer.is_world_process_zero():
        return
    console = Console(soft_wrap=True)
    prefix = "" if eval_dataset is None else _EVALUATION
    logs = [log for log in state.log_history if _names(log, prefix)]
    if logs:
        console.print(_figures_table(logs[-1], prefix))
        data = "the evaluation data" if eval_dataset is not None else "the last batches"
        tau = logs[-1].get(f"{prefix}estimated_tau")
        if tau is not None:
            console.print(f"estimated tau (tokens per target forward) on {data}: {tau:.2f}")
    console.print(f"heads are in {options.out}", markup=False)


def _names(log: Mapping[str, Any], prefix: str) -> list[str]:
    """Return the names of the draft tokens whose figures a log has, such as head0."""
    tail = "_top1"
    return [
        name.removeprefix(prefix).removesuffix(tail)
        for name in log
        if name.endswith(tail) and name.startswith(_EVALUATION) == (prefix == _EVALUATION)
    ]


def _figures_table(log: Mapping[str, Any], prefix: str) -> Table:
    tops = range(1, MAX_TOP + 1)
    table = Table(
        "draft token", "loss", *(f"top-{top}" for top in tops), title=f"step {log['step']}"
    )
    for name in _names(log, prefix):
        loss = log.get(f"{prefix}{name}_loss")  # steps that are only measured have none
        accuracies = [f"{log[f'{prefix}{name}_top{top}']:.1%}" for top in tops]
        table.add_row(name, "-" if loss is None else f"{loss:.3f}", *accuracies)
    return table
