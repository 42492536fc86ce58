"""What became of the rows of a conversion, counted by reason."""

from dataclasses import asdict, dataclass
from typing import Any

from speclm.data.rows import BrokenLine, Row

REASONS = {
    "broken_json": "the line is not JSON",
    "too_long": "the line is too long",
    "not_an_object": "the row is not an object",
    "unknown_schema": "the keys belong to no known schema",
    "missing_column": "the keys do not belong to the schema",
    "wrong_type": "a column or a turn has another type than in the schema",
    "not_text": "a text is not a string",
    "not_utf8": "a text has bytes or characters that UTF-8 lacks",
    "unknown_role": "a role is unknown",
    "bad_tool_call": "a tool or its call cannot be used",
    "no_answer": "no turn of the assistant follows one of the user",
    "empty_turn": "a turn before the first answer, or that answer, is empty",
    "role_order": "the order of roles is wrong before the first answer",
    "duplicate": "an earlier row has the same conversation",
    "leading_turns": "turns of the assistant before the first question were left out",
    "empty_system": "an empty system turn was left out",
    "cut_empty_turn": "the conversation was cut before an empty turn",
    "cut_role_order": "the conversation was cut before a turn out of order",
    "unanswered_end": "turns after the last answer were left out",
}
"""What each reason means. Rows with one of the last five are kept in part, others are dropped."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What happened to some rows.

    Args:
        is_dropped: Whether they are missing in the output; otherwise a part of each is there.
        reason: A key of `REASONS`.
        count: Number of rows.
        where: File, and line or row number, of the first.
        detail: What was found in the first; empty if the reason says all.
        excerpt: The start of the first.
    """

    is_dropped: bool
    reason: str
    count: int
    where: str
    detail: str
    excerpt: str

    @property
    def meaning(self) -> str:
        """The reason in words."""
        return REASONS[self.reason]


@dataclass(frozen=True, slots=True)
class ConversionReport:
    """What became of all rows.

    Args:
        num_rows: Rows of all sources.
        num_kept: Rows that were written.
        num_repaired: Rows of these of which only a part was written.
        schemas: Rows by the name of their schema.
        outcomes: Rows that were dropped, by reason, and then those that were repaired. A row may
            have been repaired for two reasons.
    """

    num_rows: int
    num_kept: int
    num_repaired: int
    schemas: dict[str, int]
    outcomes: tuple[Outcome, ...]

    @property
    def num_dropped(self) -> int:
        """Rows that were not written."""
        return self.num_rows - self.num_kept

    def as_dict(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        outcomes = [{**asdict(each), "meaning": each.meaning} for each in self.outcomes]
        return {**asdict(self), "num_dropped": self.num_dropped, "outcomes": outcomes}


class Tally:
    """Counts rows while they are converted."""

    def __init__(self) -> None:
        self.num_rows = self.num_kept = self.num_repaired = 0
        self.schemas: dict[str, int] = {}
        self._counts: dict[tuple[bool, str], int] = {}
        self._first: dict[tuple[bool, str], tuple[str, str, str]] = {}

    def count(
        self, reason: str, row: Row | BrokenLine, *, detail: str = "", is_dropped: bool = True
    ) -> None:
        """Count a row; the first one with its reason is remembered."""
        key = (is_dropped, reason)
        self._counts[key] = self._counts.get(key, 0) + 1
        if key not in self._first:
            self._first[key] = (row.where, detail, row.excerpt)

    def report(self) -> ConversionReport:
        """Return what was counted."""
        order = sorted(self._counts, key=lambda key: (not key[0], -self._counts[key], key[1]))
        return ConversionReport(
            self.num_rows,
            self.num_kept,
            self.num_repaired,
            dict(sorted(self.schemas.items())),
            tuple(Outcome(*key, self._counts[key], *self._first[key]) for key in order),
        )
