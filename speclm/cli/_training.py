"""The work of ``speclm train``: checks, loading, the training and its final table."""

import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from threading import current_thread, main_thread
from typing import Any

import typer
from rich.console import Console
from rich.table import Table
from transformers import EarlyStoppingCallback, TrainerCallback, TrainingArguments
from typing_extensions import override

from speclm.cli._answers import answer_data, digest
from speclm.cli._console import INTERRUPTED
from speclm.cli._features import use_features
from speclm.cli._files import require_folder_to_write
from speclm.cli._models import Loaded, load
from speclm.cli.train import MAX_LENGTH, TrainOptions
from speclm.config import require_positive
from speclm.errors import OptionError, SpeclmError
from speclm.methods.registry import Method, Recipe
from speclm.target.loading import eos_token_ids
from speclm.training.acceptance_meter import MAX_TOP
from speclm.training.arguments import parse_settings, training_arguments
from speclm.training.dataset import ExampleDataset, load_examples
from speclm.training.heads_trainer import HeadsTrainer
from speclm.training.history import write_history
from speclm.training.loss_masks import marked_excerpts
from speclm.training.partitions import divides_base, loading_whole

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
        CheckpointError: If the folder holds another model, or the checkpoints in it are of a
            training with other data or options.
        typer.Exit: With `INTERRUPTED`, if Ctrl-C ended the training; a checkpoint is saved.
    """
    console = Console(soft_wrap=True)
    arguments = _check(method, recipe, options)
    with loading_whole():
        loaded = load(options, is_placed=options.distill or not divides_base(arguments))
    dataset, eval_dataset = _examples(options, loaded, arguments)
    trainer: HeadsTrainer | None = None
    try:
        trainer = recipe.trainer(
            loaded.base, arguments, options=own, train_dataset=dataset, eval_dataset=eval_dataset
        )
        trainer.options = asdict(own) | ({"distilled": digest(options)} if options.distill else {})
        if options.patience is not None:
            trainer.add_callback(EarlyStoppingCallback(options.patience))
        if trainer.is_world_process_zero():
            _announce(trainer, marked_excerpts(dataset[0], loaded.tokenizer), console)
        use_features(trainer, options.cache_features, is_confirmed=options.yes)
        with _stops_at_interrupt(trainer) as interruption:
            trainer.train(resume_from_checkpoint=options.resume)
    except (SpeclmError, MemoryError, typer.Abort):
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
    interruption.exit_if_unfinished(console)
    _finish(trainer, options, eval_dataset, console)
    write_history(trainer, base=loaded.base, recipe=recipe.name)
    _part(trainer)


def _examples(
    options: TrainOptions, loaded: Loaded, arguments: TrainingArguments
) -> tuple[ExampleDataset, ExampleDataset | None]:
    """Return what to train and to evaluate on; with ``--distill`` the base answers it first."""
    data, eval_data, limit = options.data, options.eval_data, options.limit
    if options.distill:
        with arguments.main_process_first(desc="answering"):
            data, eval_data = answer_data(options, loaded, is_main=arguments.process_index == 0)
        limit = None
    read = partial(
        load_examples,
        tokenizer=loaded.tokenizer,
        max_length=options.max_length or _usual_length(loaded.base.config),
        eos_token_ids=eos_token_ids(loaded.base),
    )
    dataset = read(data, limit=limit, seed=options.seed)
    return dataset, None if eval_data is None else read(eval_data)


def _usual_length(config: Any) -> int:
    known: int | None = getattr(config, "max_position_embeddings", None)
    return min(known or MAX_LENGTH, MAX_LENGTH)


def _announce(trainer: HeadsTrainer, excerpts: tuple[str, str], console: Console) -> None:
    """Let a trainer say what it does on the console, which parts of the text count first."""
    trainer.announce = partial(console.print, markup=False, highlight=False)
    first, last = excerpts
    trainer.announce(f"marked in the first example: {first!r} to {last!r}")


class _Interruption(TrainerCallback):
    """Ends a training after the step in which Ctrl-C was pressed; a second one ends it at once."""

    def __init__(self, trainer: HeadsTrainer) -> None:
        self._trainer, self._is_requested = trainer, False

    def request(self, *_: Any) -> None:
        """Handle the signal."""
        if self._is_requested:
            raise KeyboardInterrupt
        self._is_requested = True
        Console(stderr=True).print("stopping after this step; press Ctrl-C again to stop at once")

    @override
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Processes that end at different steps would wait for each other.
        if self._trainer.any_process(is_true=self._is_requested):
            self._is_requested = True
            control.should_training_stop = control.should_save = True

    @override
    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._is_requested and not float(state.epoch).is_integer():
            control.should_evaluate = False  # the epoch goes on when the training is resumed

    def exit_if_unfinished(self, console: Console) -> None:
        """Exit with `INTERRUPTED` if the training ended early."""
        state = self._trainer.state
        if self._is_requested and state.global_step < state.max_steps:
            if self._trainer.is_world_process_zero():
                console.print(
                    f"interrupted after step {state.global_step} of {state.max_steps}; to go on, "
                    "run the same command with --resume"
                )
            raise typer.Exit(INTERRUPTED)


@contextmanager
def _stops_at_interrupt(trainer: HeadsTrainer) -> Iterator[_Interruption]:
    interruption = _Interruption(trainer)
    trainer.add_callback(interruption)
    if current_thread() is not main_thread():  # only the main thread gets signals
        yield interruption
        return
    previous = signal.signal(signal.SIGINT, interruption.request)
    try:
        yield interruption
    finally:
        signal.signal(signal.SIGINT, previous)


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
    if options.patience is not None and options.eval_data is None:
        raise OptionError(
            f"--patience is {options.patience} without --eval-data; name data to evaluate on"
        )
    cache = options.cache_features
    if cache is not None and not recipe.trains_heads_only:
        raise OptionError(
            f"--cache-features is {str(cache)!r}, and {recipe.name!r} needs more of the base than "
            "cached hidden states, expected a training of heads on a base that stays as it is; "
            "drop the option"
        )
    if cache is not None and cache.absolute() == out.absolute():
        raise OptionError(
            f"--cache-features and --out are both {str(out)!r}, expected a folder for each; name "
            "another"
        )
    early_stopping = {
        "load_best_model_at_end": True,
        "metric_for_best_model": "estimated_tau",
        "greater_is_better": True,
        "save_strategy": "epoch",  # as evaluation, so that the best heads are saved
        "restore_callback_states_from_checkpoint": True,  # the evaluations so far
    }
    settings = {
        "num_train_epochs": options.epochs,
        "learning_rate": options.learning_rate,
        "per_device_train_batch_size": options.batch_size,
        "per_device_eval_batch_size": options.batch_size,
        "eval_strategy": "epoch" if options.eval_data else "no",
        "seed": options.seed,
        "report_to": options.report_to.split(","),
        "use_cpu": options.device == "cpu",
        **(early_stopping if options.patience is not None else {}),
        **parse_settings(options.training_arg or []),
    }
    arguments = training_arguments(out, settings, defaults=recipe.defaults)
    if arguments.process_index == 0:  # the check of one process would disturb that of another
        require_folder_to_write("--out", out)
        if cache is not None:
            require_folder_to_write("--cache-features", cache)
    return arguments


def _finish(
    trainer: HeadsTrainer,
    options: TrainOptions,
    eval_dataset: ExampleDataset | None,
    console: Console,
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
    prefix = "" if eval_dataset is None else _EVALUATION
    logs = [log for log in state.log_history if _names(log, prefix)]
    figures = {name.removeprefix(prefix): value for name, value in logs[-1].items()} if logs else {}
    if logs:
        console.print(_figures_table(logs[-1], prefix))
        data = "the evaluation data" if eval_dataset is not None else "the last batches"
        tau = logs[-1].get(f"{prefix}estimated_tau")
        if tau is not None:
            console.print(f"estimated tau (tokens per target forward) on {data}: {tau:.2f}")
    for line in trainer.training_model.closing_lines(options.out, figures):
        console.print(line, markup=False)


def _part(trainer: HeadsTrainer) -> None:
    """End the connection of several processes, which otherwise end with an error."""
    if trainer.args.world_size > 1:
        trainer.accelerator.wait_for_everyone()
        trainer.accelerator.end_training()


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
