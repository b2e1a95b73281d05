"""Which column of a log is what, and what its cells mean: ids, and lists of ids.

EDIT NAMES for another spelling of a column.
"""

import re
from pathlib import Path
from typing import NamedTuple

from datasets.interactions import parsed
from datasets.logs import Form, bare
from engine.errors import UsageError

NAMES = {  # role -> common names of its column; the first that is there counts
    "user": "user_id userid user reviewerid uid customer_id customerid customer visitorid"
    " author_id",
    "item": "item_id itemid item parent_asin asin product_id productid iid sid movie_id movieid"
    " book_id song_id track_id business_id article_id sku",
    "time": "timestamp time unixreviewtime datetime date ts unix_time event_time created_at t_dat"
    " order_date purchase_date review_date",
    "rating": "rating overall stars score",
    "title": "title item_title movie_title product_name product_title item_name name",
}
REVIEW_TEXTS = {"text", "reviewtext", "review_text", "review"}  # their `title` is the review's
KNOWN = {name for names in NAMES.values() for name in names.split()}
WHOLE = re.compile(r"(-?\d+)\.0+")  # an id that went through a float
NOTHING = {"nan", "NaN", "null", "NULL", "None"}  # how programs write an id that is missing
LIST = re.compile(r"\s*[\[(].*[\])]\s*")
DATE = re.compile(r"\s*\d{4}-\d\d-\d\d")
SPLIT = re.compile(r"[\s,|;]+")


class Columns(NamedTuple):
    """The name of the column of each role; None where there is none."""

    user: str
    item: str
    time: str | None
    rating: str | None
    title: str | None

    def present(self) -> dict[str, str]:
        """Role -> column."""
        return {role: name for role, name in self._asdict().items() if name is not None}


def named(form: Form) -> dict[str, str]:
    """Bare name -> column; of equal ones the first."""
    return {bare(name): name for name in reversed(form.columns)}


def common(by_name: dict[str, str], role: str) -> str | None:
    """The column with the first common name of a role."""
    return next((by_name[name] for name in NAMES[role].split() if name in by_name), None)


def choose_columns(form: Form, given: dict[str, str | None]) -> Columns:
    """Which column is what: as the flags say, else by name, else by place.

    Raises:
        UsageError: a named column is missing, or user or item is not found.
    """
    chosen: dict[str, str | None] = {}
    for role, name in given.items():
        if name is not None and name not in form.columns:
            raise UsageError(
                f"--{role}={name}: {form.path} has no such column; found {form.shown()}"
            )
        chosen[role] = name
    by_name = named(form)
    if not form.header:
        by_place = _by_place(form)
        chosen |= {role: chosen[role] or by_place.get(role) for role in NAMES}
    else:
        chosen |= {role: chosen[role] or common(by_name, role) for role in NAMES}
        if REVIEW_TEXTS & set(by_name) and given["title"] is None:
            chosen["title"] = None
    missing = [role for role in ("user", "item") if not chosen[role]]
    if missing:
        flags = " and ".join(f"--{role}" for role in missing)
        raise UsageError(
            f"{form.path}: which column is the {' and the '.join(missing)}? found {form.shown()};"
            f" name it with {flags}"
        )
    if chosen["user"] == chosen["item"]:
        raise UsageError(f"{form.path}: column {chosen['user']} cannot be both user and item")
    return Columns(**chosen)


def _by_place(form: Form) -> dict[str, str]:
    """Roles of columns without names: user, item[, rating], time; Amazon's ratings-only files of
    2018 have the item first.
    """
    columns = form.columns
    if len(columns) > 4 or len(columns) < 2:
        raise UsageError(
            f"{form.path}: no header, and {len(columns)} columns ({form.shown()});"
            " name them with --user, --item, --time"
        )
    dates = [i for i in range(2) if all(DATE.match(row[i]) for row in form.sample)]
    if dates:  # a date among the first two is neither a user nor an item
        rest = [name for i, name in enumerate(columns) if i != dates[0]]
        return dict(zip(("user", "item", "rating"), rest)) | {"time": columns[dates[0]]}
    roles = ["user", "item", "rating", "time"] if len(columns) == 4 else ["user", "item", "time"]
    first, second = ([row[i] for row in form.sample] for i in (0, 1))
    asins = all(re.fullmatch(r"B\w{6,9}|\d{9}[\dX]", cell) for cell in first)
    if asins and all(re.fullmatch(r"A\w{3,20}", cell) for cell in second):
        roles[:2] = ["item", "user"]
    return dict(zip(roles, columns))


def canonical(name: str | None) -> str:
    """An id as it is written here: one line, no float of a whole number; "" where there is none."""
    name = " ".join((name or "").split())
    whole = WHOLE.fullmatch(name)
    name = whole[1] if whole else name
    return "" if name in NOTHING else name


def holds_lists(form: Form, columns: Columns) -> bool:
    """Whether lines have a user's list: as JSON, or as text where users come once and there is no
    time.
    """
    if form.lists:
        return True
    user, item = (form.columns.index(name) for name in (columns.user, columns.item))
    cells = [row[item] for row in form.sample]
    if any(LIST.fullmatch(cell) for cell in cells):
        return True
    users = [row[user] for row in form.sample]
    many = sum(len(SPLIT.split(cell.strip())) > 1 for cell in cells)
    once = len(set(users)) == len(users)
    return columns.time is None and once and 2 * many >= len(cells) > 0


def parse_list(path: Path, row: int, cell: str) -> list[str]:
    """The item ids of a cell: JSON, a Python literal, or text split at commas, spaces or bars.

    Raises:
        UsageError: an element is no text and no whole number.
    """
    values = parsed(cell)
    if not isinstance(values, list | tuple):
        values = [part.strip("'\"") for part in SPLIT.split(cell.strip().strip("[]()")) if part]
    names = []
    for position, value in enumerate(values):
        text = str(value).strip() if type(value) in (int, float, str) else ""
        if not text or text == "nan" or (type(value) is float and not value.is_integer()):
            raise UsageError(
                f"{path}: row {row}: element {position} of the list is {str(value)[:40]!r},"
                " expected an id"
            )
        names.append(f"{value:.0f}" if type(value) is float else text)
    return names


def title_list(cell: str | None, n: int) -> list[str]:
    """A list of n titles; none where the cell holds something else."""
    values = parsed(cell or "")
    if not isinstance(values, list) or len(values) != n:
        return []
    return [value if isinstance(value, str) else "" for value in values]
