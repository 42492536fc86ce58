import pytest

from tests.docs.fresh_process import forked_processes


@pytest.fixture(scope="session")
def processes():
    """Fork processes that have imported speclm already."""
    with forked_processes() as found:
        yield found
