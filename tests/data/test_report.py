import ast
import json
from pathlib import Path

import speclm.data
from speclm.data.report import REASONS, Tally
from speclm.data.rows import Row


def test_dropped_rows_come_first_and_frequent_reasons_before_rare_ones():
    tally = Tally()
    tally.num_rows, tally.num_kept, tally.num_repaired = 5, 2, 1
    tally.count("unanswered_end", Row({}, "f:1"), is_dropped=False)
    tally.count("no_answer", Row({}, "f:2"), detail="none")
    tally.count("not_text", Row({}, "f:3"))
    tally.count("not_text", Row({}, "f:4"))
    report = tally.report()
    found = [(each.reason, each.count, each.where, each.detail) for each in report.outcomes]
    assert found == [
        ("not_text", 2, "f:3", ""),
        ("no_answer", 1, "f:2", "none"),
        ("unanswered_end", 1, "f:1", ""),
    ]
    saved = json.loads(json.dumps(report.as_dict()))
    assert saved["num_dropped"] == 3
    assert saved["outcomes"][0]["meaning"] == REASONS["not_text"]


def test_every_reason_is_given_somewhere():
    folder = Path(speclm.data.__file__).parent
    sources = [path for path in folder.glob("*.py") if path.name != "report.py"]
    words = {
        node.value
        for source in sources
        for node in ast.walk(ast.parse(source.read_text()))
        if isinstance(node, ast.Constant)
    }
    cut = {"cut_empty_turn", "cut_role_order"}  # put together from the two without "cut_"
    assert set(REASONS) - cut <= words
