"""Cells that hold a list of ids, or of titles."""

import ast
import json
import re
from pathlib import Path

from engine.errors import UsageError

SPLIT = re.compile(r"[\s,|;]+")
BARE_NAN = re.compile(r"(?<=[\[, ])nan(?=[\], ])")


def parsed(cell: str) -> object:
    """A cell as JSON or as a Python literal; None where it is neither."""
    try:
        return json.loads(cell)
    except (ValueError, RecursionError):
        pass
    try:
        return ast.literal_eval(BARE_NAN.sub("None", cell) if "nan" in cell else cell)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return None


def parse_list(path: Path, row: int, cell: object) -> list[str]:
    """The item ids of a cell: JSON, a Python literal, or text split at commas, spaces or bars.

    Raises:
        UsageError: an element is no text and no whole number.
    """
    text = cell if isinstance(cell, str) else ""
    values = parsed(text)
    if not isinstance(values, list | tuple):
        values = [part.strip("'\"") for part in SPLIT.split(text.strip().strip("[]()")) if part]
    names = []
    for position, value in enumerate(values):
        name = str(value).strip() if type(value) in (int, float, str) else ""
        if not name or name == "nan" or (type(value) is float and not value.is_integer()):
            raise UsageError(
                f"{path}: row {row}: element {position} of the list is {str(value)[:40]!r},"
                " expected an id"
            )
        names.append(f"{value:.0f}" if type(value) is float else name)
    return names


def title_list(cell: object, n: int) -> list[str]:
    """A list of n titles; none where the cell holds something else."""
    values = parsed(cell) if isinstance(cell, str) else None
    if not isinstance(values, list) or len(values) != n:
        return []
    return [value if isinstance(value, str) else "" for value in values]
