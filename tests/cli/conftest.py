import pytest
import torch
from typer.testing import CliRunner

from speclm.cli import app


@pytest.fixture
def run():
    """Run a command; errors of speclm's own are raised."""
    threads = torch.get_num_threads()

    def invoke(*arguments):
        return CliRunner().invoke(app, list(arguments), catch_exceptions=False)

    yield invoke
    torch.set_num_threads(threads)
