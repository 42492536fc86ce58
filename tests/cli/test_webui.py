import socket
import sys
from contextlib import nullcontext
from types import SimpleNamespace
from unittest.mock import Mock

import pytest

from speclm.cli import webui as command
from speclm.cli._models import Loaded
from speclm.errors import OptionError
from speclm.methods.registry import heads_names
from tests.byte_tokenizer import byte_tokenizer
from tests.webui.models import tiny_methods


@pytest.fixture
def page(monkeypatch):
    """Stand in for the page, which imports Gradio; keeps what it is given."""
    found = SimpleNamespace()

    def build_app(methods, defaults, **rest):
        found.methods, found.defaults, found.rest = methods, defaults, rest
        return "app"

    def serve(app, listener):
        found.app, found.address = app, listener.getsockname()

    module = SimpleNamespace(build_app=build_app, serve=serve, Example=lambda *texts: texts)
    monkeypatch.setitem(sys.modules, "speclm.webui.page", module)
    return found


def test_the_page_offers_bundled_heads_and_what_needs_no_files(run, page):
    result = run("webui", "--port", "0", "--heads", "ngram", "--temperature", "0.5", "--seed", "3")
    host, port = page.address
    assert (host, page.app) == ("127.0.0.1", "app")
    assert f"http://127.0.0.1:{port}/" in result.stderr
    assert "password" not in result.stderr
    assert page.methods.names[0] == page.defaults.method == "ngram"
    assert {*heads_names(), "draft", "medusa", "eagle", "eagle3", "block"} == {*page.methods.names}
    assert (page.defaults.temperature, page.defaults.seed) == (0.5, 3)
    spec = page.methods.load("medusa")
    assert spec.base is page.methods.load("ngram").base
    assert "Medusa" in type(spec.proposer).__name__
    assert page.rest["examples"][0][0] == "Text to SQL"


def test_a_page_for_other_machines_says_that_it_has_no_password(run, page, monkeypatch, tmp_path):
    model = tiny_methods().load("ngram")
    monkeypatch.setattr(command, "load_with_heads", lambda _: Loaded(model, byte_tokenizer()))
    (tmp_path / "own").mkdir()
    monkeypatch.chdir(tmp_path / "own")
    address = SimpleNamespace(getsockname=lambda: ("0.0.0.0", 80))
    monkeypatch.setattr(command, "listen", lambda *_: nullcontext(address))
    result = run("webui", "--base", ".")
    assert "there is no password: who can reach this address can use the page" in result.stderr
    assert page.rest["title"] == "own"


def test_a_missing_package_a_port_in_use_and_a_foreign_host_are_named(run, page, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        with pytest.raises(OptionError, match=rf"--port {port} cannot.*in use.*another --port"):
            run("webui", "--port", port)

    for port in ("-1", "70000"):
        assert "'--port'" in run("webui", "--port", port).stderr

    for error in (socket.gaierror("name not known"), UnicodeError("label too long")):
        with monkeypatch.context() as patch:
            patch.setattr(socket, "getaddrinfo", Mock(side_effect=error))
            words = rf"--host 'nowhere' and --port 0 cannot be listened on \({error}"
            with pytest.raises(OptionError, match=words):
                run("webui", "--host", "nowhere", "--port", "0")
    monkeypatch.setattr("speclm.cli.webui.find_spec", lambda _: None)
    with pytest.raises(OptionError, match=r"gradio.*not installed.*'speclm\[webui\]'"):
        run("webui")
