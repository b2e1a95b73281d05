"""Cells of tables: lists of ids, lists of titles, and titles as they are shown."""

import ast
import csv
import html
import json
import re
from collections.abc import Container, Iterable, Iterator
from pathlib import Path

from engine.errors import UsageError

PYTHONS = re.compile(r"\d_\d|\b0[xXoObB]")  # to Python 12_3 is 123
WHOLE = re.compile(r"(-?\d+)\.0*")  # an id that went through a float
QUOTED = r"""(?:'[^']*'|"[^"]*")"""
ARRAY = re.compile(rf"\[\s*{QUOTED}(?:\s+{QUOTED})+\s*\]")  # numpy's; Python joins such texts
CUT = re.compile(r"\d[eE]\+?\d")  # a number that lost its last digits
NO_TITLE = {"", r"\n", r"\\n", "n/a", "<na>", "#n/a", "nan", "null", "(null)", "[null]", "<null>"}
NOTHING = NO_TITLE | {"na", "n.a.", "#ref!", "nat", '"null"', "none", "undefined", "(not set)"}
NOTHING |= {"-", "--", "---", "?", "-1"}
SEPARATORS = {mark: re.compile(rf"\s*[{mark}][\s{mark}]*") for mark in ",|;"}  # of lists in text
ANY_MARK = re.compile(r"\s*[,|;][\s,|;]*")
BLANKS, MARKS = re.compile(r"\s+"), re.compile(r"[\s,|;]")
SCALAR = re.compile(r"\b(?:np\.\w+|UUID|Decimal)\(([^()]*)\)")  # as numpy 2 and Python show one
WRAPPED = re.compile(  # a list as code shows it; c(1),c(2) are two ids
    r"(?:np\.|torch\.)?(?:c|array|tensor|deque|Any|list|set|\w*Array|\w*Buffer)"
    r"[\[(](?:(?!\),).)*[\])]",
    re.DOTALL,
)
# page code that stands as a title in some v2 files
SCRIPT = re.compile(r"\bvar aPageStart\b|getTime\(\)")
TAG = re.compile(r"</?[A-Za-z][^<>]*>|<span\b[^<>]*$")  # whole tags, and one that was cut off


def whole(name: str) -> str:
    """A name without the .0 that a column of floats gives to a whole number."""
    found = WHOLE.fullmatch(name)
    return found[1] if found else name


def canonical(name: object) -> str:
    """An id as it is written here, in one line; "" where it is missing."""
    text = " ".join(str(name).strip().splitlines()) if name is not None else ""
    text = text.encode("utf-8", "backslashreplace").decode()  # lone surrogates cannot be written
    return "" if whole(text).lower() in NOTHING else text


def forms(name: str) -> Iterator[str]:
    """An id, and how another file may write it: without or with the .0 of a column of floats, and
    with single blanks.
    """
    yield name
    yield whole(name)
    yield f"{name}.0"
    yield " ".join(name.split())


def form_in(known: Container[str], name: str) -> str | None:
    """How `known` writes an id; None where it has none of its forms."""
    return next((form for form in forms(name) if form in known), None)


def parsed(cell: str) -> object:
    """A cell as JSON or as a Python literal; None where it is neither."""
    try:
        return json.loads(cell)
    except (ValueError, RecursionError):
        pass
    try:
        tree = ast.parse(cell.strip(), mode="eval")
        return ast.literal_eval(_NaNs().visit(tree) if "nan" in cell else tree)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        return None


class _NaNs(ast.NodeTransformer):
    """A bare nan, as pandas writes a missing title, becomes None."""

    def visit_Name(self, node: ast.Name) -> ast.AST:
        return ast.Constant(None) if node.id == "nan" else node


def splitter(cells: Iterable[object]) -> re.Pattern | None:
    """What splits lists that are text: the mark that half of those with several words have, so that
    a list of one name of two words stays one; None where there is none.
    """
    texts = [cell for cell in cells if isinstance(cell, str) and cell[:1] not in ("[", "(", "{")]
    several = [text for text in texts if MARKS.search(text.strip())]
    counts = {mark: sum(mark in text for text in several) for mark in SEPARATORS}
    most = max(counts, key=counts.get)
    return SEPARATORS[most] if counts[most] and 2 * counts[most] >= len(several) else None


def _split(text: str, split: re.Pattern | None) -> list[str]:
    """A text's parts; without `split` at commas, bars or semicolons, or at blanks without any."""
    split = split or (ANY_MARK if ANY_MARK.search(text) else BLANKS)
    return [part.strip("'\"") for part in split.split(text.strip()) if part]


def parse_list(path: Path, row: int, cell: object, split: re.Pattern | None = None) -> list[str]:
    """The item ids of a cell: JSON, a Python literal, an array of Postgres or numpy, or text; a
    number is a list of one. Raises UsageError: an element is no text and no whole number.

    Args:
        split: see `splitter`.
    """
    text = "" if cell is None or cell != cell else str(cell).strip()
    text = SCALAR.sub(r"\1", text) if "(" in text else text
    quoted = "'" in text or '"' in text
    literal = text[:1] in ("[", "(", "'", '"') and (quoted or not PYTHONS.search(text))
    values: object = None
    if text[:1] + text[-1:] == "{}":
        inside = next(csv.reader([text[1:-1]], skipinitialspace=True), [])
        values = [part.strip("'") for part in inside]
    elif ARRAY.fullmatch(text):
        values = [part[1:-1] for part in re.findall(QUOTED, text)]
    elif literal:
        values = parsed(text)
    if not isinstance(values, list | tuple):
        if WRAPPED.fullmatch(text):
            raise UsageError(f"{path}: row {row}: the list {text[:40]!r} is code; write JSON lists")
        if text.startswith("[") and text.count("[") > text.count("]"):
            raise UsageError(
                f"{path}: row {row}: the list {text[:40]!r} is not closed: was it cut?"
            )
        values = _split(_unwrapped(text), split)
    names = []
    for position, value in enumerate(values):
        name = str(value).strip() if type(value) in (int, float, str) else ""
        broken = type(value) is float and (not value.is_integer() or CUT.search(text))
        if name in ("", "nan", "...", "->") or broken or {"{", "}"} & set(name):
            raise UsageError(
                f"{path}: row {row}: element {position} of the list is {str(value)[:40]!r},"
                " expected an id"
            )
        names.append(f"{value:.0f}" if type(value) is float else name)
    return names


def _unwrapped(text: str) -> str:
    """Without the brackets around the whole: those of X1(R),X2(L) are of an item."""
    closing, depth = {"[": "]", "(": ")"}.get(text[:1]), 1
    for letter in text[1:-1] if closing else "":
        depth += (letter == text[:1]) - (letter == closing)
        if not depth:
            return text
    return text[1:-1] if closing and text.endswith(closing) else text


def title_list(cell: object, n: int) -> list[str]:
    """A list of n titles; none where the cell holds something else."""
    values = parsed(cell) if isinstance(cell, str) else None
    if not isinstance(values, list) or len(values) != n:
        return []
    return [value if isinstance(value, str) else "" for value in values]


def clean_title(title: object) -> str:
    """Entities resolved, HTML tags, page code and surplus white space removed; maybe "", as for a
    word for nothing.
    """
    if title is None or title != title:
        return ""
    title = str(title)
    if SCRIPT.search(title) or title.strip().lower() in NO_TITLE:
        return ""
    text = html.unescape(TAG.sub(" ", html.unescape(title)))
    # lone surrogates cannot be written
    return " ".join(text.encode("utf-8", "replace").decode().split())
