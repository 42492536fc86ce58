import importlib
from dataclasses import replace

import pytest

from speclm.bench import plain_decoder
from speclm.demo.bundle import load_prompts

demo_module = importlib.import_module("speclm.cli.demo")  # the package's `demo` is the function


@pytest.fixture(autouse=True)
def _short_answers(monkeypatch):
    monkeypatch.setattr(demo_module, "MAX_NEW_TOKENS", {"sql": 4, "gsm8k": 4})


@pytest.mark.parametrize(
    "settings", [("greedy",), pytest.param(("greedy", "t1.0"), marks=pytest.mark.slow)]
)
def test_demo_compares_both_sets_and_is_identical(settings, run, monkeypatch):
    monkeypatch.setattr(demo_module, "SETTINGS", settings)
    result = run("demo", "--num-prompts", "1", "--threads", "1", "--tuning-prompts")
    assert result.exit_code == 0
    assert "identical: yes" in result.output
    rows = [line.split()[:3] for line in result.output.splitlines()]
    for name in ("sql", "gsm8k"):
        for setting in settings:
            for method in ("lookup", "draft", "medusa", "eagle", "eagle3", "block"):
                assert [name, setting, method] in rows
    assert "SELECT" in result.output


def test_demo_is_identical_with_more_prompts_than_there_are(run, monkeypatch):
    monkeypatch.setattr(
        demo_module, "load_prompts", lambda name, limit: load_prompts(name, limit=1)
    )
    monkeypatch.setattr(demo_module, "_methods", lambda base: [plain_decoder(base)])
    result = run("demo", "--num-prompts", "999")
    assert (result.exit_code, "identical: yes" in result.output) == (0, True)
    assert all(setting in result.output for setting in ("greedy", "t1.0"))


def test_demo_fails_when_an_output_differs(run, monkeypatch):
    def wrong_method(name, base, proposer):
        method = plain_decoder(base)
        return replace(method, name=name, generate=lambda call: method.generate(call) + 1)

    monkeypatch.setattr(demo_module, "_methods", lambda base: [wrong_method("draft", base, None)])
    monkeypatch.setattr(demo_module, "SETTINGS", ("greedy",))
    result = run("demo", "--num-prompts", "1", "--threads", "1", "--tuning-prompts")
    assert result.exit_code == 1
    assert "identical: NO" in result.output
