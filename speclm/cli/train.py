"""``speclm train``: one command for each recipe that a method declares.

Imports no PyTorch: the help comes from the options of the recipes.
"""

from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from importlib import import_module
from inspect import Parameter, Signature
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer

from speclm.cli._config_file import config_parameter, with_training_args
from speclm.cli._options import MAX_INT, ModelOptions
from speclm.methods.registry import Method, Recipe, registered_methods

MAX_LENGTH = 2048
"""Maximum tokens of an example if no number is given."""

_ARGUMENTS = {
    "epochs": "num_train_epochs",
    "learning_rate": "learning_rate",
    "batch_size": "per_device_train_batch_size",
}
"""Options whose defaults a recipe may change, with their names in ``TrainingArguments``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainOptions(ModelOptions):
    """Options of every training."""

    data: Annotated[Path, typer.Option(help='JSON lines with "messages".')]
    out: Annotated[Path, typer.Option(help="Folder for heads and checkpoints.")]
    eval_data: Annotated[
        Path | None, typer.Option(help="JSON lines to evaluate on after each epoch.")
    ] = None
    distill: Annotated[
        bool,
        typer.Option("--distill", help="Let the base answer all data anew first, into --out."),
    ] = False
    distill_tokens: Annotated[
        int, typer.Option(min=1, help="Maximum new tokens of an answer of --distill.")
    ] = 512
    patience: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Evaluations without a better estimated tau before the training ends; "
            "the best heads are kept.",
        ),
    ] = None
    epochs: Annotated[float, typer.Option(help="Passes over the data.")] = 2.0
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 1e-3
    batch_size: Annotated[int, typer.Option(min=1, help="Examples per step and device.")] = 8
    max_length: Annotated[
        int | None,
        typer.Option(
            min=3, help=f"Tokens kept of an example; by default as the base, at most {MAX_LENGTH}."
        ),
    ] = None
    limit: Annotated[
        int | None, typer.Option(min=1, help="Examples to train on, drawn at random.")
    ] = None
    seed: Annotated[
        int, typer.Option(min=0, max=MAX_INT, help="Seed of new heads and of the data order.")
    ] = 0
    resume: Annotated[
        bool, typer.Option("--resume", help="Resume from the newest checkpoint in --out.")
    ] = False
    cache_features: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the base's hidden states, which are written once and then read in "
            "every epoch."
        ),
    ] = None
    yes: Annotated[
        bool, typer.Option("--yes", help="Write what --cache-features needs without asking.")
    ] = False
    report_to: Annotated[str, typer.Option(help="tensorboard, wandb, ... or none.")] = "none"
    training_arg: Annotated[
        list[str] | None,
        typer.Option(
            help="Any field of TrainingArguments, as key=value; repeatable.",
            callback=with_training_args,
        ),
    ] = None


def train_app() -> typer.Typer:
    """Return the group of commands for the methods that are registered now."""
    app = typer.Typer(help="Train heads for a base.", no_args_is_help=True)
    for method in registered_methods().values():
        for recipe in method.recipes:
            app.command(recipe.name)(_command(method, recipe))
    return app


def _command(method: Method, recipe: Recipe) -> Callable[..., None]:
    """Return a function whose parameters are a recipe's own options and the common ones."""
    own, shared = _parameters(recipe.options), _parameters(TrainOptions, recipe)

    def run(config: Path | None, **values: Any) -> None:  # noqa: ARG001 - it gave defaults
        options = recipe.options(
            **{parameter.name: values.pop(parameter.name) for parameter in own}
        )
        module = import_module("speclm.cli._training")
        module.train(method, recipe, options, TrainOptions(**values))

    required = [parameter for parameter in shared if parameter.default is Parameter.empty]
    rest = [parameter for parameter in shared if parameter.default is not Parameter.empty]
    parameters = [*required, *own, *rest]
    changed: Any = run
    changed.__signature__ = Signature([*parameters, config_parameter(recipe.name, parameters)])
    changed.__doc__ = recipe.summary
    return run


def _parameters(options: type, recipe: Recipe | None = None) -> list[Parameter]:
    """Return a keyword parameter for each field of a dataclass of options."""
    hints = get_type_hints(options, include_extras=True)
    parameters = []
    for field in fields(options):
        default = Parameter.empty if field.default is MISSING else field.default
        if recipe is not None and field.name in _ARGUMENTS:
            default = recipe.defaults.get(_ARGUMENTS[field.name], default)
        annotation = _option(field.name, hints[field.name])
        parameters.append(
            Parameter(field.name, Parameter.KEYWORD_ONLY, annotation=annotation, default=default)
        )
    return parameters


def _option(name: str, hint: Any) -> Any:
    """Turn ``Annotated[type, help]``, as methods write it, into a Typer option."""
    if get_origin(hint) is not Annotated or not isinstance(get_args(hint)[1], str):
        return hint
    kind, text = get_args(hint)
    if kind is bool:  # no --no-name
        return Annotated[kind, typer.Option(f"--{name.replace('_', '-')}", help=text)]
    return Annotated[kind, typer.Option(help=text)]
