import socket
import sys
from types import SimpleNamespace

import pytest

from speclm.errors import OptionError
from speclm.methods.registry import heads_names


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
    assert page.methods.names[0] == page.defaults.method == "ngram"
    assert {*heads_names(), "draft", "medusa", "eagle", "eagle3", "block"} == {*page.methods.names}
    assert (page.defaults.temperature, page.defaults.seed) == (0.5, 3)
    spec = page.methods.load("medusa")
    assert spec.base is page.methods.load("ngram").base
    assert "Medusa" in type(spec.proposer).__name__
    assert page.rest["examples"][0][0] == "Text to SQL"


def test_a_missing_package_a_port_in_use_and_a_foreign_host_are_named(run, page, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        with pytest.raises(OptionError, match=rf"--port {port} cannot.*in use.*another --port"):
            run("webui", "--port", port)

    def unknown(*_, **__):
        raise socket.gaierror("name not known")

    with monkeypatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", unknown)
        with pytest.raises(OptionError, match=r"--host 'nowhere' and --port 0 cannot.*not known"):
            run("webui", "--host", "nowhere", "--port", "0")
    monkeypatch.setattr("speclm.cli.webui.find_spec", lambda _: None)
    with pytest.raises(OptionError, match=r"gradio.*not installed.*'speclm\[webui\]'"):
        run("webui")
