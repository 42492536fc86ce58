import sys

import pytest
import transformers.dynamic_module_utils

from tests.byte_tokenizer import VOCAB_SIZE, byte_tokenizer
from tests.models import build_model


@pytest.fixture(scope="package")
def base(tmp_path_factory):
    """Folder of a tiny base with a tokenizer."""
    folder = tmp_path_factory.mktemp("serving") / "base"
    build_model("llama", vocab_size=VOCAB_SIZE).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="package")
def draft(tmp_path_factory):
    """Folder of a draft model for it."""
    folder = tmp_path_factory.mktemp("serving") / "draft"
    build_model("llama", vocab_size=VOCAB_SIZE, num_hidden_layers=1).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def modules(tmp_path, monkeypatch):
    """Keep the code that Transformers copies in a folder of the test."""
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "m"))
    monkeypatch.syspath_prepend(tmp_path / "m")
    # Another test of the process may have imported it; these are no server.
    monkeypatch.delitem(sys.modules, "transformers.cli.serving.server", raising=False)
