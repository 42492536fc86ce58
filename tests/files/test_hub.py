"""Heads and draft models on the hub: which files are taken, and what is said otherwise."""

import json
from shutil import copytree
from time import perf_counter

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from speclm import SpecModel
from speclm.cli import app
from speclm.demo.bundle import assets
from speclm.drafting.package import EXPORT_NAME
from speclm.errors import OptionError, SpeclmError, UnknownNameError, UploadError
from speclm.files.hub import HubOptions, UploadOptions, fetch_existing, upload
from speclm.methods.draft_model.proposer import DraftModelProposer
from speclm.methods.eagle.proposer import EagleProposer
from speclm.methods.finding import find_heads
from speclm.methods.medusa.proposer import MedusaProposer
from speclm.model.exporting import convert_heads
from speclm.model.heads import load_proposer
from tests.model.hub import SHAS, running_hub
from tests.model.test_loading_eagle import write as write_eagle
from tests.models import build_model, shared_model

LEFTOVERS = (
    *("optimizer.pt", "scheduler.pt", "rng_state.pth", "rng_state_0.pth", "training_args.bin"),
    *("scaler.pt", "trainer_state.json", "bf16_zero_pp_rank_0_optim_states.pt", "evil.py"),
    *("checkpoint-9/optimizer.pt", "checkpoint-9/model.safetensors", "runs/config.json"),
)


def load(heads, base, **heads_kwargs):
    return load_proposer(heads, base, heads_kwargs=heads_kwargs, num_draft_tokens=None)


def run(*arguments):
    result = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output


def write_medusa(folder, *, value=0.0):
    folder.mkdir(parents=True, exist_ok=True)
    state = {f"{head}.0.linear.weight": torch.full((40, 40), value) for head in range(2)}
    save_file(state, folder / "medusa_lm_head.safetensors")
    (folder / "config.json").write_text('{"medusa_num_heads": 2}')


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with running_hub(tmp_path, monkeypatch) as hub:
        yield hub


@pytest.fixture(scope="module")
def deep_base():
    return build_model("llama", num_hidden_layers=7, head_dim=10)


def test_medusa_heads_are_taken_from_their_revision_and_subfolder(hub, tmp_path):
    base = shared_model("llama")
    write_medusa(tmp_path / "me/heads")
    write_medusa(tmp_path / "me/heads@v2", value=2.0)
    write_medusa(tmp_path / "me/heads@v2/a/b", value=3.0)
    found = {
        (): load("me/heads", base),
        ("v2",): load("me/heads", base, revision="v2"),
        ("v2", "a/b"): load("me/heads", base, revision="v2", subfolder="a/b/"),
    }
    assert [float(p.heads.weight[0, 0, 0, 0]) for p in found.values()] == [0.0, 2.0, 3.0]


def test_eagle_heads_are_taken_from_their_revision(hub, tmp_path, deep_base):
    (tmp_path / "org").mkdir()
    write_eagle(tmp_path / "org/heads", "eagle3")
    write_eagle(tmp_path / "org/heads@v2", "eagle")
    proposer = load("org/heads", deep_base, revision="v2", depth=2)
    assert isinstance(proposer, EagleProposer)
    assert (proposer.heads.config.kind, proposer.config.depth) == ("eagle", 2)


def test_draft_model_is_looked_at_and_loaded_in_its_revision_and_cache(hub, tmp_path):
    base = shared_model("llama")
    write_medusa(tmp_path / "me/draft")  # main is something else
    build_model("llama", seed=7, num_hidden_layers=1).save_pretrained(tmp_path / "me/draft@v2/sub")
    options = {"revision": "v2", "subfolder": "sub", "cache_dir": tmp_path / "mine"}
    hub.gated["me/draft"] = "Bearer hf_me"
    proposer = load("me/draft", base, token="hf_me", **options)
    assert isinstance(proposer, DraftModelProposer)
    assert not any("/main/" in path for path in hub.asked if "config.json" in path)
    assert list((tmp_path / "cache").rglob("*.safetensors")) == []
    hub.asked.clear()
    load("me/draft", base, local_files_only=True, **options)
    assert hub.asked == []


def test_heads_in_the_bases_repository_are_of_its_revision_unless_another_is_given(hub, tmp_path):
    for name, value in (("me/merged", 1.0), ("me/merged@v2", 2.0)):
        base = build_model("llama")
        base.config.medusa_num_heads = 2
        base.save_pretrained(tmp_path / name)
        file = tmp_path / name / "model.safetensors"
        heads = {f"medusa_head.{i}.0.linear.weight": torch.full((40, 40), value) for i in range(2)}
        save_file({**load_file(file), **heads}, file, metadata={"format": "pt"})
    spec = SpecModel.from_pretrained("me/merged", "me/merged", dtype=torch.float32, revision="v2")
    assert isinstance(spec.proposer, MedusaProposer)
    assert float(spec.proposer.heads.weight[0, 0, 0, 0]) == 2.0
    main = SpecModel.from_pretrained(
        "me/merged", "me/merged", heads_kwargs={"revision": "main"}, revision="v2"
    )
    assert float(main.proposer.heads.weight[0, 0, 0, 0]) == 1.0


def test_base_and_heads_have_their_own_revisions_and_share_token_and_cache(hub, tmp_path):
    build_model("llama").save_pretrained(tmp_path / "me/base@v2")
    (tmp_path / "me/base").mkdir()
    write_medusa(tmp_path / "me/heads")
    write_medusa(tmp_path / "me/heads@v2", value=2.0)
    hub.gated |= dict.fromkeys(("me/base", "me/heads"), "Bearer hf_me")
    shared = {"token": "hf_me", "cache_dir": tmp_path / "mine", "dtype": torch.float32}
    revisions = {"revision": "v2", "heads_revision": "main"}
    spec = SpecModel.from_pretrained("me/base", "me/heads", **revisions, **shared)
    assert float(spec.proposer.heads.weight[0, 0, 0, 0]) == 0.0
    lines = []
    spec.print_report(write=lines.append)
    assert [line.split()[-1] for line in lines if " commit " in line] == [SHAS["v2"], SHAS["main"]]
    assert list((tmp_path / "cache").rglob("*.safetensors")) == []
    hub.asked.clear()
    offline = SpecModel.from_pretrained(
        "me/base", "me/heads", local_files_only=True, **revisions, **shared
    )
    assert hub.asked == []
    assert offline.proposer.hub_commit == SHAS["main"]


def test_option_of_heads_that_is_given_twice_is_refused():
    for name in ("revision", "subfolder"):
        options = {f"heads_{name}": "v2", "heads_kwargs": {name: "v1"}}
        with pytest.raises(OptionError, match=f"heads_{name} is 'v2'.*'v1'.*leave the other out"):
            SpecModel.from_pretrained(shared_model("llama"), "me/heads", **options)


def test_commands_record_the_commits_of_base_and_heads(hub, tmp_path):
    copytree(assets()["base"], tmp_path / "me/base@v2")
    copytree(assets()["eagle3"], tmp_path / "me/heads/sub")
    (tmp_path / "me/base").mkdir()
    (tmp_path / "me/heads@v2").mkdir()
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "records.jsonl"
    prompts.write_text('{"prompt": "2 + 2?"}')
    base = ("--base", "me/base", "--revision", "v2")
    size = ("--setting", "greedy", "--max-new-tokens", "2", "--prompts", str(prompts))
    heads = ("--heads", "me/heads", "--heads-subfolder", "sub")
    run("bench", *base, *heads, *size, "--out", str(out))
    settings = json.loads(out.read_text())["settings"]
    assert (settings["base_commit"], settings["heads_commit"]) == (SHAS["v2"], SHAS["main"])
    own = ("--heads", "me/base")  # of the base's revision too: main holds no model
    run("generate", *base, *own, "--prompt", "2 + 2?", "--max-new-tokens", "2")
    to = ("--heads-subfolder", "sub", "--to", "vllm", "--out", str(tmp_path / "out"))
    run("convert", "me/heads", *base, *to)
    made = json.loads((tmp_path / "out" / EXPORT_NAME).read_text())
    assert made["base"] == {"name": "me/base", "commit": SHAS["v2"]}
    assert (made["source"]["name"], made["source"]["commit"]) == ("me/heads", SHAS["main"])


def test_revision_of_a_local_base_is_refused_in_a_conversion(tmp_path):
    for base in (assets()["base"], None):
        with pytest.raises(OptionError, match=r"revision is 'v2' and base .*expected the hub id"):
            convert_heads(assets()["eagle3"], tmp_path, to="vllm", base=base, revision="v2")


def test_only_the_shards_that_hold_heads_are_downloaded_with_configs(hub, tmp_path):
    base = shared_model("llama")
    folder = tmp_path / "me/heads"
    write_medusa(folder)
    whole = folder / "medusa_lm_head.safetensors"
    index = {}
    for number, (key, tensor) in enumerate(load_file(whole).items()):
        index[key] = f"model-{number}.safetensors"
        save_file({key: tensor}, folder / index[key])
    whole.unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (folder / "pytorch_model.bin").write_bytes(b"")
    (folder / "checkpoint-1").mkdir()
    (folder / "checkpoint-1/model.safetensors").write_bytes(b"")
    assert isinstance(load("me/heads", base), MedusaProposer)
    configs = {"config.json", "model.safetensors.index.json"}
    assert {*hub.sent} == {*configs, *index.values()}


@pytest.mark.parametrize("kind", ["medusa", "eagle", "pickled"])
def test_leftovers_of_a_training_are_not_downloaded(hub, tmp_path, deep_base, kind):
    folder = tmp_path / "me" / "heads"
    if kind == "medusa":
        write_medusa(folder)
    else:
        folder.parent.mkdir()
        write_eagle(folder, "eagle", pickled=kind == "pickled")
    for name in LEFTOVERS:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}")
    load("me/heads", deep_base)
    weights = {"medusa": "medusa_lm_head.safetensors", "eagle": "model.safetensors"}
    assert {*hub.sent} == {"config.json", weights.get(kind, "pytorch_model.bin")}


@pytest.mark.parametrize(
    ("heads", "options", "words"),
    [
        ("me/nothing", {}, r"no repository 'me/nothing', or a private one.*'token'"),
        ("me/heads", {"revision": "v9"}, r"'me/heads' on the hub has no revision 'v9'"),
        ("me/gated", {}, r"access to 'me/gated' on the hub is restricted.*'token'"),
        ("me/gated", {"token": "hf_wrong"}, r"access to 'me/gated' on the hub is restricted"),
        ("me/heads", {"local_files_only": True}, r"'main' of 'me/heads' is not in the cache"),
        ("me/empty", {}, r"folder needs a config.json.*config.json"),
    ],
)
def test_hub_errors_say_what_it_was_and_keep_their_cause(hub, tmp_path, heads, options, words):
    for name in ("me/heads", "me/gated"):
        write_medusa(tmp_path / name)
    (tmp_path / "me/empty").mkdir()
    (tmp_path / "me/empty/README.md").write_text("")
    hub.gated["me/gated"] = "Bearer hf_me"
    with pytest.raises(UnknownNameError, match=words) as caught:
        load(heads, shared_model("llama"), **options)
    assert caught.value.__cause__ is not None
    assert "hf_wrong" not in str(caught.value)
    assert "registered are" in str(caught.value)


def test_hub_that_cannot_be_reached_is_asked_once(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    start = perf_counter()
    with pytest.raises(UnknownNameError, match=r"cannot be reached.*check the network") as caught:
        load("me/heads", shared_model("llama"))
    assert caught.value.__cause__ is not None
    assert perf_counter() - start < 5  # seconds; each retry waits one or more


@pytest.mark.parametrize(
    ("heads", "words"),
    [
        ("medusa", r"'medusa' is a kind of heads.*speclm.demo.assets"),
        ("eagle3", r"'eagle3' is a kind of heads"),
        ("draft", r"'draft' is a kind of heads"),
        ("ngrm", r"did you mean 'ngram'"),
        ("eagle-3", r"did you mean 'eagle3'"),
        ("/no/such/folder", r"nor a folder that exists, nor a hub id"),
        ("../heads", r"nor a hub id"),
        ("a/b/c", r"nor a hub id"),
        ("", r"nor a hub id|needs"),
        ("a" * 5000, r"nor a hub id|on the hub"),
        ("a\0b", r"nor a hub id"),
    ],
)
def test_names_that_cannot_be_repositories_are_answered_without_the_hub(hub, heads, words):
    with pytest.raises(UnknownNameError, match=words) as caught:
        load(heads, shared_model("llama"))
    assert hub.asked == []
    assert len(str(caught.value)) < 1500


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"revision": 3}, r"revision in heads_kwargs is a int"),
        ({"token": 3}, r"token in heads_kwargs is a int"),
        ({"local_files_only": "no"}, r"local_files_only in heads_kwargs is a str"),
        ({"subfolder": "../x"}, r"subfolder in heads_kwargs is '../x'"),
        ({"subfolder": "/x"}, r"subfolder in heads_kwargs is '/x'"),
    ],
)
def test_options_that_say_nothing_are_refused(options, words):
    with pytest.raises(OptionError, match=words):
        load("me/heads", shared_model("llama"), **options)


def test_local_folder_has_subfolders_and_no_revisions(tmp_path):
    write_medusa(tmp_path / "sub")
    options = {"subfolder": "sub", "token": "hf_me", "local_files_only": True}
    assert isinstance(load(tmp_path, shared_model("llama"), **options), MedusaProposer)
    with pytest.raises(OptionError, match=r"is a folder and \['revision'\].*no effect"):
        load(tmp_path / "sub", shared_model("llama"), revision="v2")
    for heads in ("ngram", None, ["ngram"]):
        with pytest.raises(OptionError, match="revision"):
            load(heads, shared_model("llama"), revision="v2")


def test_token_is_never_shown():
    assert "hf_me" not in repr(HubOptions(token="hf_me"))


@pytest.mark.parametrize("text", ["[" * 10**5, '{"architectures": [3]}', "\xff", "[]", "{"])
def test_configs_that_are_none_say_nothing(tmp_path, text):
    (tmp_path / "config.json").write_bytes(text.encode("latin1"))
    try:
        source = find_heads(tmp_path)
    except SpeclmError:
        return
    assert source.method.name == "draft_model"


def test_missing_subfolder_of_a_local_folder_is_named():
    with pytest.raises(UnknownNameError, match="has no subfolder 'a'"):
        find_heads(assets()["medusa"], {"subfolder": "a"})


FILES = {"a.txt": b"content"}
PLAIN = UploadOptions(message="Upload heads")


def test_files_are_uploaded_to_a_branch_or_as_a_pull_request(hub, tmp_path):
    (tmp_path / "b.txt").write_text("more")
    files = {**FILES, "b.txt": tmp_path / "b.txt"}
    options = UploadOptions(message="New", revision="dev", private=True, token="hf_me")
    assert "/me/heads/commit/" in upload("me/heads", files, options)
    assert hub.commits["me/heads"] == {"a.txt": b"content", "b.txt": b"more"}
    assert (hub.branches, hub.tokens) == (["dev"], {"Bearer hf_me"})
    (created,) = hub.created
    assert created.get("visibility", created.get("private")) in {"private", True}
    address = upload("me/heads", FILES, UploadOptions(message="New", create_pr=True))
    assert address == f"{hub.endpoint}/me/heads/discussions/1"


def test_refused_uploads_say_what_to_do(hub):
    for status, words in {
        401: "the hub does not know you .*hf auth login.*HF_TOKEN",
        403: "you may not write to 'me/heads'.*repository of your own.*--create-pr",
        404: "has no repository 'me/heads' that you may see",
        409: "has changed, or the name is taken",
        400: "refuses the upload.*correct what it names",
    }.items():
        hub.refused = {"/commit/" if status == 409 else "/api/": status}
        with pytest.raises(UploadError, match=words):
            upload("me/heads", FILES, PLAIN)


def test_hub_that_cannot_be_reached_is_named(hub, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UploadError, match=r"upload to 'me/heads' failed.*check the network"):
        upload("me/heads", FILES, PLAIN)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UploadError, match="HF_HUB_OFFLINE forbids an upload"):
        upload("me/heads", FILES, PLAIN)


def test_what_a_repository_holds_is_read_before_an_upload(hub, tmp_path):
    assert fetch_existing("me/new", PLAIN, ("*.json",)) is None
    write_medusa(tmp_path / "me/heads")
    found = fetch_existing("me/heads", PLAIN, ("*.json",))
    assert [path.name for path in found.iterdir()] == ["config.json"]
    branch = UploadOptions(message="New", revision="dev")
    assert fetch_existing("me/heads", branch, ("*.json",)) is None
    (tmp_path / "me/gated").mkdir()
    hub.gated["me/gated"] = "Bearer another"
    with pytest.raises(UploadError, match="you may not write to 'me/gated'"):
        fetch_existing("me/gated", PLAIN, ("*.json",))
