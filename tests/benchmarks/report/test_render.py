import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from benchmarks.report import render

ROOT = Path(__file__).parents[3]
MARKED = "before\n<!-- results:decode{filters} -->\nold\n<!-- /results -->\nafter\n"


def a_record(*, date="2026-11-21T10:00:00+00:00", n=100, num_identical=100, **fields):
    names = ("median", "tau", "unit", "benchmark", "promises_identity", "machine", "commit")
    given = {name: fields.pop(name) for name in names if name in fields}
    settings = {"prompts": "sql_dev", "setting": "greedy", "method": "ngram", "batch": 1}
    return {
        "benchmark": "decode",
        "settings": {**settings, "dtype": "float32", **fields},
        "unit": "times regular generation",
        "n": n,
        "median": 1.5,
        "lower_quartile": 1.25,
        "upper_quartile": 1.75,
        "promises_identity": True,
        "num_identical": num_identical,
        "tau": 2.0,
        "acceptance_by_depth": [0.75, 0.5, 0.25, 0.1],
        "machine": {"cpu": "some CPU", "num_cores": 2, "num_threads": 1, "gpus": []},
        "versions": {"python": "3.11.7", "torch": "2.13.0"},
        "commit": {"sha": "0123456789abcdef", "is_dirty": False},
        "date": date,
        **given,
    }


@pytest.fixture
def rewrite(tmp_path):
    def rewritten(*records, filters="", name="decode"):
        lines = [json.dumps(record) for record in records]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
        text = MARKED.format(filters=filters).replace("results:decode", f"results:{name}")
        return render.rewrite(text, tmp_path)

    return rewritten


def unwrapped(text):
    return " ".join(text.split())


def rows(text):
    return [line for line in text.splitlines() if line.startswith("| ")]


def test_tables_and_picture_are_those_of_the_records(capsys):
    assert render.main(["--check"]) == 0, capsys.readouterr().err


def test_figures_of_the_readme_are_of_one_run_of_a_clean_commit():
    records = render.read_records(ROOT / render.RESULTS / "speedup.jsonl")
    assert len({json.dumps(record["commit"]) for record in records}) <= 1
    assert not any(record["commit"]["is_dirty"] for record in records)
    cells = [(*(r["settings"][key] for key in ("prompts", "setting", "method")),) for r in records]
    assert len(set(cells)) == len(cells)


def test_row_shows_speedup_with_quartiles_tau_and_acceptance(rewrite):
    header, _, row = rows(rewrite(a_record()))
    assert header == "| setting | method | text-to-SQL | tau | accepted |"
    assert row == '| greedy | `"ngram"` | 1.50 [1.25, 1.75] | 2.00 | 75 50 25 |'


def test_text_around_the_markers_and_the_markers_stay(rewrite):
    text = rewrite(a_record(), filters=" batch=1")
    assert text.startswith("before\n<!-- results:decode batch=1 -->\n**")
    assert text.endswith("|\n<!-- /results -->\nafter\n")
    assert "old" not in text


def test_rendering_again_changes_nothing(rewrite, tmp_path):
    text = rewrite(a_record())
    assert render.rewrite(text, tmp_path) == text


def test_newest_record_of_a_cell_wins_wherever_it_stands(rewrite):
    newer = a_record(date="2026-11-22T10:00:00+00:00", median=3.0, n=7, num_identical=7)
    text = rewrite(newer, a_record(num_prompts=3))
    assert "3.00 [" in text
    assert "1.50 [" not in text
    assert " 7 pairs" in text


def test_sets_are_columns_and_missing_cells_are_marked(rewrite):
    header, _, greedy, warm = rows(
        rewrite(a_record(setting="t1.0", prompts="gsm8k_dev"), a_record())
    )
    assert header.count("tau |") == header.count("accepted |") == 2
    assert header.index("text-to-SQL") < header.index("maths")
    assert greedy.endswith("| 75 50 25 | - | - | - |")
    assert warm.startswith('| T = 1 | `"ngram"` | - | - | - | 1.50')


def test_known_methods_come_in_their_order_and_unknown_ones_last(rewrite):
    methods = ["mine", "medusa", "ngram", "plain"]
    names = [
        row.split(" | ")[1] for row in rows(rewrite(*(a_record(method=a) for a in methods)))[2:]
    ]
    assert names == ["plain against plain", '`"ngram"`', "Medusa heads", "mine"]


def test_any_other_setting_makes_a_table_of_its_own(rewrite):
    text = rewrite(
        a_record(),
        a_record(batch=4),
        a_record(dtype="bfloat16"),
        a_record(shape="7B"),
        a_record(new_setting=3),
    )
    assert text.count("| setting | method |") == 5
    for title in ("**batch 1, float32.**", "batch 4", "bfloat16", "7B", "new setting 3"):
        assert title in text


def test_what_follows_from_other_settings_makes_no_table(rewrite):
    derived = {"options": {"top_k": 0}, "max_new_tokens": 256, "layers": [1]}
    assert rewrite(a_record(), a_record(method="draft", **derived)).count("| setting |") == 1


def test_rows_of_other_commits_than_the_newest_are_left_out(rewrite):
    other = {"sha": "fedcba9876", "is_dirty": True}
    newer = a_record(date="2026-11-22T10:00:00+00:00", method="draft", commit=other)
    text = rewrite(newer, a_record())
    assert "commit fedcba9 (modified)." in text
    assert [row.split(" | ")[1] for row in rows(text)[2:]] == ["draft model"]


def test_filters_of_the_marker_choose_records(rewrite):
    text = rewrite(a_record(), a_record(batch=4), filters=" batch=4 dtype=float32")
    assert text.count("| setting | method |") == 1
    assert "**batch 4" in text


def test_filter_none_leaves_out_what_has_the_setting(rewrite):
    text = rewrite(a_record(), a_record(shape="1b", median=9.0), filters=" shape=None")
    assert "1.50 [" in text
    assert "9.00 [" not in text


def test_inflated_tables_say_so_and_what_each_forward_reads(rewrite):
    inflated = {"shape": "1b", "is_inflated": True}
    text = rewrite(
        a_record(method="plain", **inflated, bytes_read={"base": 2_470_000_000}),
        a_record(
            method="draft", **inflated, bytes_read={"base": 2_470_000_000, "draft": 250_000_000}
        ),
    )
    assert text.count("| setting | method |") == 1
    assert "**batch 1, float32, 1b, inflated.**" in text
    assert "Weights read by one forward: base 2.47 GB, draft 0.25 GB." in unwrapped(text)


def test_table_says_what_it_was_measured_on(rewrite):
    machine = {"cpu": "some CPU", "num_cores": 1, "num_threads": 4, "gpus": ["a GPU"]}
    text = rewrite(
        a_record(),
        a_record(
            method="draft",
            n=25,
            num_identical=24,
            machine=machine,
        ),
    )
    for words in (
        "25 to 100 pairs",
        "some CPU, 2 cores, 1 thread and a GPU, some CPU, 1 core, 4 threads",
        "python 3.11.7, torch 2.13.0",
        "commit 0123456.",
        "Outputs identical to `base.generate`: 124 of 125; the others differ from a near tie on",
    ):
        assert words in unwrapped(text)


def test_identity_counts_neither_plain_nor_lossless_methods(rewrite):
    text = rewrite(a_record(method="plain"), a_record(method="assisted", promises_identity=False))
    assert "Outputs" not in text


def test_method_without_tau_has_a_ratio_alone(rewrite):
    assert rows(rewrite(a_record(tau=None)))[2].endswith("| 1.50 [1.25, 1.75] | - | - |")


def test_times_have_one_column(rewrite):
    record = a_record(unit="ms", benchmark="import", tau=None, num_identical=None)
    record["settings"] = {}
    header, _, row = rows(rewrite(record, name="overhead"))
    assert (header, row) == ("| benchmark | ms |", "| import | 1.50 [1.25, 1.75] |")


def test_rules_are_shown_by_shape_with_tau_over_all_calls(rewrite):
    unit = "tokens per target forward"
    chains = [
        a_record(unit=unit, shape=shape, method="coupled", rule="exact")
        for shape in ("chain", "tree 8")
    ]
    header, _, chain, tree = rows(rewrite(*chains, name="rules"))
    assert header == "| shape | method | text-to-SQL: tau | by call |"
    assert chain == "| chain | coupled | 2.00 | 1.50 [1.25, 1.75] |"
    assert tree.startswith("| tree 8 |")


def test_tau_is_shown_by_setting_nodes_drafter_and_ranking(rewrite):
    unit = "tokens per target forward"
    records = [
        a_record(unit=unit, method=method, num_nodes=nodes, drafter=drafter)
        for method, nodes, drafter in (
            ("coupled", 16, "draft"),
            ("top-k", 8, "eagle3"),
            ("top-k", 8, "draft"),
        )
    ]
    header, _, *found = rows(rewrite(*records, name="tau"))
    assert header == "| setting | num nodes | drafter | method | text-to-SQL: tau | by call |"
    assert [row.split(" | ")[1:4] for row in found] == [
        ["8", "draft model", "top-k"],
        ["8", "EAGLE-3 heads", "top-k"],
        ["16", "draft model", "coupled"],
    ]


def test_kernels_are_shown_with_what_they_read_and_compute(rewrite):
    work = {"bytes": 4_000_000, "operations": 600_000_000}
    shape = {"prefix": 8192, "num_nodes": 16, "work": work}
    given = {"unit": "us", "benchmark": "tree_attention", "tau": None, "num_identical": None}
    records = [
        a_record(**given, **shape, method=method, median=2.0, device="cuda")
        for method in ("flex", "ours")
    ]
    del records[0]["settings"]["work"]
    other = a_record(**given, method="ours")
    other["benchmark"] = "keep_path"
    text = rewrite(*records, other, name="kernels", filters=" benchmark=tree_attention")
    header, _, ours, flex = rows(text)
    assert header == "| batch | prefix | num nodes | method | us | GB/s | TFLOP/s |"
    assert ours == "| 1 | 8192 | 16 | ours | 2.0 [1.2, 1.8] | 2000 | 300 |"
    assert flex.endswith("| compiled FlexAttention | 2.0 [1.2, 1.8] | - | - |")


def test_dispatch_is_shown_with_both_times(rewrite):
    settings = {"groups": 4, "times": {"ours_ms": 1.234, "theirs_ms": 2.5}, "method": None}
    unit = "times Transformers' SDPA"
    header, _, row = rows(rewrite(a_record(unit=unit, tau=None, **settings), name="kernels"))
    assert header == "| batch | groups | speed-up | ours | Transformers |"
    assert row == "| 1 | 4 | 1.50 [1.25, 1.75] | 1.23 | 2.50 |"


def test_what_has_no_records_is_not_measured_yet(tmp_path):
    assert "Not measured yet." in render.rewrite(MARKED.format(filters=""), tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "<!-- results -->\n<!-- /results -->\n",
        "<!-- results:decode -->\n",
        "<!-- results:decode batch -->\n<!-- /results -->\n",
        MARKED.format(filters="") + "<!-- /results -->\n",
    ],
)
def test_broken_markers_are_refused(tmp_path, text):
    with pytest.raises(ValueError, match=r"markers; write <!-- results:NAME"):
        render.rewrite(text, tmp_path)


def test_unknown_unit_is_refused(rewrite):
    with pytest.raises(ValueError, match=r"unit 'furlongs'.*UNITS"):
        rewrite(a_record(unit="furlongs"))


@pytest.fixture
def checkout(tmp_path):
    for name in render.PAGES:
        page = tmp_path / name
        page.parent.mkdir(exist_ok=True)
        page.write_text(MARKED.format(filters=""))
    return tmp_path


def test_check_names_what_is_out_of_date_and_writes_nothing(checkout, capsys):
    before = (checkout / "README.md").read_text()
    assert render.main(["--root", str(checkout), "--check"]) == 1
    assert (
        "README.md is out of date; run python benchmarks/report/render.py"
        in capsys.readouterr().err
    )
    assert (checkout / "README.md").read_text() == before


def test_check_passes_after_rewriting(checkout, capsys):
    assert render.main(["--root", str(checkout)]) == 0
    assert "README.md rewritten" in capsys.readouterr().out
    assert render.main(["--root", str(checkout), "--check"]) == 0


def test_broken_page_is_named_with_exit_code_2(checkout, capsys):
    (checkout / "README.md").write_text("<!-- results:decode -->\n")
    assert render.main(["--root", str(checkout)]) == 2
    assert "README.md: 0 results are between two markers" in capsys.readouterr().err


def test_picture_has_a_bar_for_each_method_and_set(checkout):
    records = [
        a_record(method=method, prompts=prompts)
        for method in ("ngram", "eagle3 auto")
        for prompts in ("sql_dev", "gsm8k_dev")
    ]
    results = checkout / render.RESULTS
    results.mkdir(parents=True)
    unshown = a_record(setting="t1.0", median=9.0)
    lines = [json.dumps(record) for record in (*records, unshown)]
    (results / "speedup.jsonl").write_text("\n".join(lines))
    assert render.main(["--root", str(checkout)]) == 0
    drawn = ElementTree.parse(checkout / render.PICTURE).getroot()
    texts = ["".join(node.itertext()) for node in drawn.iter() if node.tag.endswith("text")]
    assert texts.count("1.50, tau 2.00") == 4
    assert {'"ngram"', 'EAGLE-3 heads, tree="auto"', "text-to-SQL", "maths"} <= set(texts)
    assert "tau: tokens per target forward (prefill excluded);" in texts
    assert not any("9.00" in text for text in texts)
    (checkout / render.PICTURE).write_text("old")
    assert render.main(["--root", str(checkout), "--check"]) == 1


def test_picture_without_records_says_so(checkout):
    render.main(["--root", str(checkout)])
    assert "not measured yet" in (checkout / render.PICTURE).read_text()
