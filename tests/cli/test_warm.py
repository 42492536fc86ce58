import json

import pytest

from speclm.demo.bundle import assets, load_prompts
from speclm.errors import CheckpointError, DataError, OptionError
from speclm.methods.recycling.checkpoint import memory_fingerprint
from speclm.methods.recycling.memory import CandidateMemory

QUICK = ("--max-new-tokens", "4", "--threads", "1", "--device", "cpu")


@pytest.fixture
def data(tmp_path):
    """Write one prompt, one text and one chat with its answer."""
    asked = load_prompts("sql_tune", limit=2)
    rows = [
        {"messages": asked[0]},
        {"prompt": "1 2 3"},
        {"messages": [*asked[1], {"role": "assistant", "content": "SELECT 1"}]},
    ]
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_warm_writes_a_memory_of_the_base_and_merges_older_ones(run, data, tmp_path):
    from transformers import AutoModelForCausalLM

    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    result = run("warm", "--prompts", str(data), "--out", str(first), *QUICK)
    assert result.exit_code == 0
    for words in ("3 prompts", "positions read", "pairs", "MB", f"written to {first}"):
        assert words in result.output
    base = AutoModelForCausalLM.from_pretrained(assets()["base"])
    about = {"vocab_size": base.vocab_size, "fingerprint": memory_fingerprint(base)}
    memory = CandidateMemory.load(first, **about)
    assert memory.num_pairs > 50

    few = ("--num-prompts", "1", "--merge", str(first), "--max-pairs", "5000")
    run("warm", "--prompts", str(data), "--out", str(second), *few, *QUICK)
    assert CandidateMemory.load(second, **about).num_pairs == memory.num_pairs

    first.write_bytes(b"no memory")
    with pytest.raises(CheckpointError, match=r"cannot be read .*expected a whole memory"):
        run("warm", "--prompts", str(data), "--out", str(second), *few, *QUICK)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (("--out", "memory"), OptionError, r"--out is 'memory', expected a file named \*\.safe"),
        (("--out", "no/such/m.safetensors"), OptionError, r"--out is .* make .* first"),
        (("--prompts", "none.jsonl"), DataError, "none.jsonl cannot be read"),
    ],
)
def test_wrong_options_are_named_before_the_base_is_loaded(run, data, options, error, message):
    given = {"--prompts": str(data), "--out": str(data.with_name("m.safetensors"))}
    given |= dict([options])
    with pytest.raises(error, match=message):
        run("warm", *(word for pair in given.items() for word in pair), *QUICK)


def test_numbers_out_of_range_are_usage_errors(run, data):
    result = run("warm", "--prompts", str(data), "--out", "m.safetensors", "--max-pairs", "-1")
    assert result.exit_code == 2
