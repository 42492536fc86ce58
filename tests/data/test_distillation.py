import json

import pytest
import torch

from speclm import SpecModel
from speclm.data import DistillSettings, ModelSource, Shard, distill
from speclm.data.dialogues import Drop
from speclm.data.shards import shard_path
from speclm.errors import DataError, OptionError
from speclm.training.conversations import read_conversations
from tests.byte_tokenizer import STRICT_TEMPLATE, VOCAB_SIZE, byte_tokenizer
from tests.models import build_model

ENDS = list(range(40, 52))  # often enough that answers have many lengths
SETTINGS = {"max_new_tokens": 12, "batch_size": 3, "keep_cut": True}
SAMPLED = DistillSettings(**SETTINGS, temperature=1.5, seed=3)
NUM_ROWS = 14


@pytest.fixture(scope="module")
def base():
    model = build_model("llama", vocab_size=VOCAB_SIZE)
    model.generation_config.eos_token_id = ENDS
    return model


@pytest.fixture
def source(base):
    return ModelSource(SpecModel(base, None), byte_tokenizer())


@pytest.fixture
def data(tmp_path):
    """Write rows with one to three questions."""
    path = tmp_path / "data.jsonl"
    rows = [
        {
            "id": f"row {n}",
            "messages": messages(*(f"{n}{'x' * turn}?" for turn in range(n % 3 + 1))),
        }
        for n in range(NUM_ROWS)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def messages(*questions):
    return [
        turn
        for question in questions
        for turn in (
            {"role": "user", "content": question},
            {"role": "assistant", "content": "old" * len(question)},
        )
    ]


def rows_of(path):
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]


def run(data, source, *, name="out.jsonl", **options):
    out = data.with_name(name)
    options.setdefault("settings", DistillSettings(**SETTINGS))
    return out, distill(data, out, source, **options)


def test_every_answer_is_what_the_base_generates_after_the_new_ones(data, source, base):
    heads = ModelSource(SpecModel.from_pretrained(base, "lookup"), byte_tokenizer())
    out, report = run(data, heads)
    tokenizer, found = byte_tokenizer(), rows_of(out)
    ids = [int(row["id"].removeprefix("row ")) for row in found]
    assert ids == sorted(ids)
    assert num_finished(report) == NUM_ROWS
    assert len(found) == report.totals.num_rows >= NUM_ROWS - 2  # some say nothing
    num_tokens = 0
    for row in found:
        for turn, message in enumerate(row["messages"]):
            if message["role"] == "user":
                continue
            prompt = tokenizer.apply_chat_template(
                row["messages"][:turn], add_generation_prompt=True, tokenize=False
            )
            inputs = tokenizer(prompt, return_tensors="pt")
            regular = base.generate(**inputs, max_new_tokens=12, do_sample=False)
            new = regular[0, inputs["input_ids"].shape[1] :].tolist()
            num_tokens += len(new)
            is_cut = new[-1] not in ENDS
            text = tokenizer.decode(new if is_cut else new[:-1], skip_special_tokens=True)
            assert message["content"] == text
            is_last = turn == len(row["messages"]) - 1
            assert is_cut == (is_last and row["finish_reason"] == "length")
    assert {row["finish_reason"] for row in found} == {"stop", "length"}
    assert [each.messages for each in read_conversations(out)] == [row["messages"] for row in found]
    assert report.out == out
    assert report.totals.num_tokens == report.progress.num_new_tokens >= num_tokens
    assert report.tau >= 1.0
    assert not out.with_name("out.jsonl.shards").exists()


def num_finished(report):
    return report.totals.num_rows + report.totals.dropped.total()


class StoppedError(Exception):
    pass


def test_sampled_rows_depend_on_neither_shards_nor_interruptions(data, source):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    out, _ = run(data, source, settings=SAMPLED)
    whole = out.read_bytes()
    assert torch.equal(torch.get_rng_state(), before)

    for index in (2, 0, 1):  # in any order
        out, report = run(data, source, name="b", settings=SAMPLED, shard=Shard(index, 3))
        assert (report.out is None) == (index != 1)
    assert out.read_bytes() == whole
    _, again = run(data, source, name="b", settings=SAMPLED, shard=Shard(0, 3))
    assert again.progress.num_new_tokens == 0
    assert (again.totals, again.tau is not None) == (report.totals, True)

    def stop(progress):
        if progress.num_done >= 6:
            raise StoppedError

    with pytest.raises(StoppedError):
        run(data, source, name="c", settings=SAMPLED, on_progress=stop)
    # As a process that was killed: a batch is there in part, and its last line too.
    path = shard_path(data.with_name("c.shards"), Shard())
    path.write_bytes(path.read_bytes()[:-9])
    seen = []
    out, report = run(data, source, name="c", settings=SAMPLED, on_progress=seen.append)
    assert out.read_bytes() == whole
    assert (seen[0].num_done, seen[-1].num_done) == (5, NUM_ROWS)
    assert report.progress.num_resumed == 5
    assert num_finished(report) == NUM_ROWS

    other = DistillSettings(**{**SETTINGS, "batch_size": 2}, temperature=1.5, seed=3)
    with pytest.raises(OptionError, match=r"batch_size, which decides sampled .*\(3 there, 2 he"):
        run(data, source, name="b", settings=other, shard=Shard(0, 3))

    out, _ = run(data, source, name="d", settings=DistillSettings(**SETTINGS, temperature=1.5))
    assert out.read_bytes() != whole


def test_rows_without_an_answer_of_use_are_dropped_and_counted(data, base, tmp_path):
    long = [{"role": "user", "content": "x" * 480}]
    rows = [
        {"messages": [{"role": "system", "content": "s"}, *messages("q")]},
        {"messages": [*long, *messages("x" * 40)]},
        {"messages": [*long]},
        {"messages": [{"role": "assistant", "content": "hello"}]},
        *({"messages": messages(f"{n}?")} for n in range(6)),
        {"messages": messages("r"), "chat_template_kwargs": {"refuses": True}},
    ]
    template = "{% if refuses %}{{ raise_exception('as told') }}{% endif %}" + STRICT_TEMPLATE
    data.write_text("\n".join(map(json.dumps, rows)))
    source = ModelSource(SpecModel(base, None), byte_tokenizer(template))
    settings = DistillSettings(max_new_tokens=12, batch_size=4)
    out, report = run(data, source, settings=settings)
    totals = report.totals
    assert totals.dropped[Drop.REFUSED] == 2
    assert totals.dropped[Drop.NO_QUESTION] == totals.dropped[Drop.TOO_LONG] == 1
    assert totals.examples[Drop.REFUSED] == "row 1: TemplateError: no system role"
    assert "tokens, 512 positions" in totals.examples[Drop.TOO_LONG]
    assert totals.dropped[Drop.CUT] >= 1
    assert totals.num_rows == len(rows_of(out)) >= 1
    assert num_finished(report) == len(rows)


def test_the_last_positions_of_a_model_bound_the_answer(data, base):
    room = 7
    length = 512 - room - 3  # with the two roles and the end
    question = {"role": "user", "content": "x" * length}
    data.write_text(json.dumps({"messages": [question]}))
    model = SpecModel(base, None)
    ends, model.generation_config.eos_token_id = model.generation_config.eos_token_id, None
    try:
        _, report = run(data, ModelSource(model, byte_tokenizer()))
    finally:
        model.generation_config.eos_token_id = ends
    assert report.totals.num_tokens == room


def test_a_run_with_other_settings_data_or_model_is_refused(data, source, tmp_path):
    def stop(_):
        raise StoppedError

    with pytest.raises(StoppedError):
        run(data, source, on_progress=stop)
    other = build_model("llama", vocab_size=VOCAB_SIZE, seed=1)
    changed = {
        r"settings temperature \(0.0 there, 1.5 here\)": {"settings": SAMPLED},
        r"model weights \('": {"source": ModelSource(SpecModel(other, None), byte_tokenizer())},
        r"num_shards \(1 there, 2 here\)": {"shard": Shard(0, 2)},
    }
    for message, options in changed.items():
        with pytest.raises(OptionError, match=rf"holds rows of another run.*{message}"):
            run(data, **{"source": source, **options})
    faster = DistillSettings(**{**SETTINGS, "batch_size": 2}, seed=5)  # not what greedy rows are of
    with pytest.raises(StoppedError):
        run(data, source, settings=faster, on_progress=stop)
    data.write_text(data.read_text() + "\n" + json.dumps({"messages": messages("new")}))
    with pytest.raises(OptionError, match=r"data rows \(14 there, 15 here\); data sha256"):
        run(data, source)
    _, report = run(data, source, overwrite=True)
    assert num_finished(report) == 15


def test_batch_that_does_not_fit_in_memory_is_named_with_what_to_do(data, source, monkeypatch):
    def fail(**_):
        raise torch.OutOfMemoryError("tried to allocate 2 GiB")

    monkeypatch.setattr(source.spec, "generate", fail)
    for settings, words in (
        (DistillSettings(**SETTINGS), r"batch of 3 conv.*2 GiB.*smaller --batch-size.*max_new_tok"),
        (SAMPLED, r"smaller --batch-size.*pass --overwrite"),
    ):
        with pytest.raises(OptionError, match=words):
            run(data, source, settings=settings, overwrite=True)


def test_what_cannot_be_written_or_answered_is_named_at_once(data, source, base, tmp_path):
    with pytest.raises(OptionError, match="is the data, expected another file"):
        run(data, source, name=data.name, overwrite=True)
    data.with_name("out.jsonl").write_text("mine")
    with pytest.raises(OptionError, match="exists; name another file"):
        run(data, source)
    with pytest.raises(OptionError, match="no chat template"):
        ModelSource(SpecModel(base, None), byte_tokenizer(None))
    data.write_text("")
    with pytest.raises(DataError, match="no rows"):
        run(data, source)
    data.write_text(json.dumps({"messages": [{"role": "system", "content": "s"}]}))
    with pytest.raises(DataError, match=r"all 1 rows are dropped.*nothing to answer: 1"):
        run(data, source, overwrite=True)
