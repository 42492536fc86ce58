"""Folders of heads on a hub of this machine: what is uploaded, and what is said otherwise."""

import json
import re

import pytest
import torch

from speclm import SpecModel
from speclm.cards import GENERATED_MARK, REPORT_NAME
from speclm.drafting.heads_folder import store_choices
from speclm.errors import CheckpointError, DataError, OptionError
from speclm.files.atomic import write_json
from speclm.files.hub import UploadOptions
from speclm.files.weights import weights_digest
from speclm.methods.medusa.proposer import MedusaProposer
from speclm.methods.medusa.training import new_medusa_heads
from speclm.model.publishing import drafting_digest, prepare_publication, publish
from tests.model.hub import running_hub
from tests.model.test_saving import with_eagle, with_heads
from tests.models import build_model
from tests.training.alphabet import TAGGED, tiny_base, word_tokenizer

PLAIN = UploadOptions(message="Upload heads")
HISTORY = {
    "kind": "speclm training",
    "recipe": "medusa",
    "version": "0.1.0",
    "base": "org/base",
    "steps": 13,
    "options": {"num_heads": 2},
    "data": {"examples": 50, "sha256": "ab12"},
    "arguments": {"learning_rate": 0.02, "lr_scheduler_type": "cosine"},
    "log": [{"step": 13, "eval_estimated_tau": 1.48, "estimated_tau": 1.6}],
}
RECORD = {
    "settings": {
        "method": "speclm",
        "setting": "greedy",
        "batch": 1,
        "device": "cpu",
        "dtype": "float32",
        "prompts": "dev.jsonl",
        "num_prompts": 10,
        "max_new_tokens": 48,
    },
    "machine": {"cpu": "EPYC", "gpus": []},
    "latency": {"mean": 0.12, "p90": 0.2},
    "plain_latency": {"mean": 0.24, "p90": 0.3},
    "tau": 1.55,
    "median": 1.4,
    "lower_quartile": 1.2,
    "upper_quartile": 1.6,
    "num_identical": 10,
    "n": 10,
}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with running_hub(tmp_path / "hub", monkeypatch) as hub:
        yield hub


@pytest.fixture
def folder(tmp_path):
    """A folder as a training leaves it: heads, history, curves, and much that is not uploaded."""
    folder = tmp_path / "heads"
    with_heads(build_model("llama"), tree=None).save_pretrained(folder)
    write_json(folder / "training.json", {**HISTORY, "weights": weights_digest(folder)})
    (folder / "curves.png").write_bytes(b"curves")
    for name in ("optimizer.pt", "trainer_state.json", "training_args.bin", "evil.py"):
        (folder / name).write_text("")
        (folder / "checkpoint-2").mkdir(exist_ok=True)
        (folder / "checkpoint-2" / name).write_text("")
    return folder


def write_report(folder, *, digest, **settings):
    folder.mkdir(exist_ok=True)
    for name in ("speed.png", "latency.png", "acceptance.png"):
        (folder / name).write_bytes(name.encode())
    record = {**RECORD, "settings": {**RECORD["settings"], "heads_sha256": digest, **settings}}
    write_json(folder / REPORT_NAME, {"records": [record]})


def test_heads_are_uploaded_with_a_card_of_recipe_figures_and_charts(hub, folder):
    write_report(folder / "report", digest=weights_digest(folder))
    address = publish(prepare_publication(folder, "me/heads"), PLAIN)
    assert address.startswith(f"{hub.endpoint}/me/heads/commit/")
    files = hub.commits["me/heads"]
    assert files.keys() == {
        *("README.md", "config.json", "medusa_lm_head.safetensors", "curves.png"),
        *("report/speed.png", "report/latency.png", "report/acceptance.png"),
    }
    assert files["curves.png"] == b"curves"
    card = files["README.md"].decode()
    for text in (
        'base_model: "org/base"',
        "| estimated tau, evaluation data | 1.48 |",
        "| tau as decoded, greedy, batch 1 | 1.55 |",
        "| speed-up, greedy, batch 1 | 1.40 (quartiles 1.20 to 1.60) |",
        "| mean 120, P90 200; regular generation mean 240, P90 300 |",
        "10 prompts of dev.jsonl, at most 48 new tokens, float32, EPYC",
        "| command | `speclm train medusa`, speclm 0.1.0 |",
        "| SHA-256 of their tokens | ab12 |",
        "| steps | 13 |",
        "![Curves of the training](curves.png)",
        "![Speed-up](report/speed.png)",
    ):
        assert text.removeprefix("|") in card
    assert str(folder) not in card


def test_snippet_of_the_card_runs(tmp_path, capsys):
    base = tiny_base()
    word_tokenizer(TAGGED).save_pretrained(tmp_path / "base")
    base.save_pretrained(tmp_path / "base")
    heads = MedusaProposer(new_medusa_heads(base, num_heads=2), target=base)
    SpecModel(base, heads).save_pretrained(tmp_path / "heads")
    card = prepare_publication(tmp_path / "heads", "me/heads").card
    (snippet,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    for name, place in (("path/to/base", "base"), ("me/heads", "heads")):
        snippet = snippet.replace(name, str(tmp_path / place))
    exec(snippet, {})
    assert "tokens per target forward" in capsys.readouterr().out


def test_nothing_is_needed_but_the_heads(folder):
    for name in ("training.json", "curves.png"):
        (folder / name).unlink()
    found = prepare_publication(folder, "me/heads", base="org/other")
    assert found.sizes.keys() == {"README.md", "config.json", "medusa_lm_head.safetensors"}
    assert 'from_pretrained("org/other", "me/heads")' in found.card
    assert "Training" not in found.card
    assert "Measured" not in found.card


def test_tree_that_was_stored_is_shown_next_to_the_default(folder):
    config = json.loads((folder / "config.json").read_text())
    notes = {"tau": 2.31, "default_tau": 2.1, "setting": "greedy"}
    config["speclm"] = {"choices": [[0], [1]], "calibration": notes}
    write_json(folder / "config.json", config)
    card = prepare_publication(folder, "me/heads").card
    assert "| tree | 2 nodes, not counting the root |" in card
    assert "| tau of the stored tree, greedy | 2.31, as decoded when it was chosen |" in card
    assert "| tau of the default trees, greedy | 2.10, on the same prompts |" in card


def test_eagle_heads_are_read_without_their_base(tmp_path):
    with_eagle(build_model("llama", num_hidden_layers=7, head_dim=10), "eagle3").save_pretrained(
        tmp_path
    )
    found = prepare_publication(tmp_path, "me/heads")
    assert found.method.name == "eagle"
    assert "| hidden states read | 2, n // 2 and n - 3 of n layers (0 is" in found.card


def test_card_of_a_user_is_kept_here_and_there(hub, folder):
    (folder / "README.md").write_text("# Mine")
    found = prepare_publication(folder, "me/heads")
    assert found.is_own_card
    publish(found, PLAIN)
    assert hub.commits["me/heads"]["README.md"] == b"# Mine"

    (folder / "README.md").unlink()
    (hub.root / "me/heads/README.md").write_text("# Edited on the hub")
    publish(prepare_publication(folder, "me/heads"), PLAIN)
    assert "README.md" not in hub.commits["me/heads"]

    (hub.root / "me/others").mkdir()
    (hub.root / "me/others/README.md").write_text(GENERATED_MARK)
    publish(prepare_publication(folder, "me/others"), PLAIN)
    assert "README.md" in hub.commits["me/others"]


def test_another_model_in_the_repository_is_not_overwritten(hub, folder):
    theirs = hub.root / "me/model"
    theirs.mkdir(parents=True)
    (theirs / "config.json").write_text('{"model_type": "llama", "num_hidden_layers": 32}')
    with pytest.raises(OptionError, match=r"'me/model' on the hub holds another model.*medusa"):
        publish(prepare_publication(folder, "me/model"), PLAIN)
    assert hub.commits == {}


def test_report_of_other_heads_is_refused(folder, tmp_path):
    write_report(folder / "report", digest="of others")
    with pytest.raises(OptionError, match=r"report is of other heads.*speclm bench"):
        prepare_publication(folder, "me/heads")
    report = tmp_path / "elsewhere"
    with pytest.raises(DataError, match=r"report\.json: cannot be read as a report"):
        prepare_publication(folder, "me/heads", report=report)
    write_report(report, digest=weights_digest(folder))
    (report / "speed.png").unlink()
    with pytest.raises(DataError, match=r"speed\.png: found no chart"):
        prepare_publication(folder, "me/heads", report=report)


def test_report_of_heads_without_their_stored_tree_is_refused(folder):
    write_report(folder / "report", digest=drafting_digest(folder))
    assert "1.55" in prepare_publication(folder, "me/heads").card
    store_choices(folder, ((0,), (0, 0)), notes={}, check=lambda _: None)
    with pytest.raises(OptionError, match=r"report is of .*tuned again"):
        prepare_publication(folder, "me/heads")
    write_report(folder / "report", digest=drafting_digest(folder))
    assert "1.55" in prepare_publication(folder, "me/heads").card


def test_history_of_other_heads_is_refused(folder):
    write_json(folder / "training.json", {**HISTORY, "weights": "of others"})
    with pytest.raises(CheckpointError, match=r"training\.json: the history is of other weights"):
        prepare_publication(folder, "me/heads")


def test_what_is_no_folder_of_safe_heads_is_refused(folder, tmp_path):
    for name in ("heads", "a/b/c", "https://hub"):
        with pytest.raises(OptionError, match=r"repository is .* expected a hub id such as"):
            prepare_publication(folder, name)
    with pytest.raises(OptionError, match="is no folder"):
        prepare_publication(tmp_path / "none", "me/heads")
    (tmp_path / "empty").mkdir()
    with pytest.raises(OptionError, match="holds no heads"):
        prepare_publication(tmp_path / "empty", "me/heads")
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"found no config\.json"):
        prepare_publication(folder, "me/heads")
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "config.json").write_text('{"medusa_num_heads": 1}')
    torch.save({"0.0.linear.weight": torch.zeros(4, 4)}, pickled / "medusa_lm_head.pt")
    with pytest.raises(CheckpointError, match=r"pickled weights.*save_pretrained"):
        prepare_publication(pickled, "me/heads")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("adapter/adapter_config.json", "found an adapter of the base.*merge the adapter"),
        ("base/config.json", "found a tuned base.*as it is; upload both together"),
    ],
)
def test_heads_for_a_tuned_base_are_refused(folder, name, words):
    (folder / name).parent.mkdir()
    (folder / name).write_text("{}")
    with pytest.raises(OptionError, match=words):
        prepare_publication(folder, "me/heads")


def test_damaged_heads_are_not_uploaded(folder):
    path = folder / "medusa_lm_head.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(CheckpointError):
        prepare_publication(folder, "me/heads")
