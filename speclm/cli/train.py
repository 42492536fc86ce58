"""``speclm train``: trains heads for a base."""

import typer

from speclm.cli._train_eagle import eagle, eagle3
from speclm.cli._train_medusa import medusa

train = typer.Typer(help="Train heads for a base.", no_args_is_help=True)
for command in (medusa, eagle, eagle3):
    train.command()(command)
