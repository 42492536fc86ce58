"""When a node is worth its place in the draft of a batch."""

import math


def least_chance(min_chance: float, *, num_rows: int) -> float:
    """Return the chance of acceptance below which a node costs more time than it saves.

    What a round costs at least is shared by the rows, what a node costs is not: among more rows a
    node has to be likelier. Measured on batches of four, where twice the threshold of a single
    row was best for n-grams and for Medusa heads; hence the square root.

    Args:
        min_chance: The threshold for a single row.
        num_rows: Rows that are still generated.
    """
    return min(min_chance * math.sqrt(max(num_rows, 1)), max(min_chance, 0.5))
