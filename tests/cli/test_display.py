from io import StringIO

from rich.console import Console
from transformers import AutoTokenizer

from speclm.bench import Comparison, Divergence, Outcome, Pair
from speclm.cli._display import (
    ACCEPTED_STYLE,
    add_comparison,
    category_table,
    coloured,
    comparison_table,
    verdict,
)
from speclm.demo.bundle import assets
from speclm.stats import RowStats, SpeculationStats
from tests.byte_tokenizer import byte_tokenizer

SAME = Pair(Outcome([[1, 2]], 2.0, None), Outcome([[1, 2]], 1.0, None))
OTHER = Pair(Outcome([[1, 2]], 2.0, None), Outcome([[1, 3]], 1.0, None))


def comparison(pairs, *, gap=None, promises_identity=True):
    found = [] if gap is None else [Divergence(0, 0, 1, 2, 3, gap, 0.1)]
    return Comparison("ngram", promises_identity, pairs, found)


def test_verdict_tells_identical_from_rounding_from_wrong():
    assert verdict(comparison([SAME])).plain == "yes"
    assert verdict(comparison([OTHER], gap=0.1)).plain == "0/1, rounding"
    assert verdict(comparison([OTHER], gap=9.0)).plain == "NO, 0/1"
    assert verdict(comparison([OTHER], promises_identity=False)).plain == "0/1"


def test_accepted_tokens_are_coloured_and_the_targets_own_are_not():
    tokenizer = AutoTokenizer.from_pretrained(assets()["base"])
    tokens = tokenizer("SELECT one FROM two WHERE three", add_special_tokens=False)["input_ids"]
    text = coloured(tokens, RowStats(accepted_lengths=[2, 0]), tokenizer)
    assert text.plain == tokenizer.decode(tokens)
    styled = "".join(text.plain[s.start : s.end] for s in text.spans if s.style == ACCEPTED_STYLE)
    assert styled == tokenizer.decode(tokens[:3])[len(tokenizer.decode(tokens[:1])) :]


def test_table_shows_ratio_and_tau_within_80_columns():
    stats = SpeculationStats(rows=[RowStats([2, 1], [2, 2, 2], [2, 1], 6)], rounds=2)
    outcome = Outcome([[1, 2]], 1.0, stats)
    table = comparison_table(("set", "setting"))
    pairs = [Pair(SAME.plain, outcome)]
    add_comparison(table, ("gsm8k", "greedy"), comparison(pairs))
    console = Console(width=80, record=True, file=StringIO())
    console.print(table)
    lines = console.export_text().splitlines()
    assert len(lines) == 2
    assert "2.00x" in lines[1]
    assert "2.50" in lines[1]
    assert "100 50 0" in lines[1]


def test_names_of_categories_are_text():
    table = category_table([("greedy", "[/] [red]\x1b[0m\na", comparison([SAME]))])
    console = Console(width=80, record=True, file=StringIO())
    console.print(table)
    assert console.export_text().splitlines()[1].startswith("[/] [red][0m a ")
    console.print(category_table([("greedy", "long " * 50, comparison([SAME]))]))
    assert console.export_text().splitlines()[1].startswith("long long long long long long l… ")


def test_escape_sequences_that_are_split_over_tokens_do_not_reach_the_terminal():
    tokenizer = byte_tokenizer()
    hostile = "a\x1b]0;x\x07\x9b31mb\u202e好"
    tokens = tokenizer(hostile, add_special_tokens=False)["input_ids"]
    assert len(tokens) == len(hostile.encode())  # a token is a byte: C1 controls are split too
    text = coloured(tokens, RowStats(accepted_lengths=[len(tokens)]), tokenizer)
    assert text.plain == "a]0;x31mb好"
