"""Histories of users from a file: a log by original ids, or lists per user."""

from pathlib import Path

import numpy as np

from datasets.interactions import read_histories
from datasets.items import Finder, Items, listing_of
from datasets.logs import NAMES, ROLES, UNTIMED, canonical, choose_columns, read_log
from datasets.tables import bare, open_table

Histories = dict[str, list[int]]  # user -> catalogue indices


def of_domain(csv_path: Path, names: Items) -> Histories:
    """The domain's own users."""
    rows = read_histories(csv_path)
    return {user: np.searchsorted(names.ids, ids).tolist() for user, ids in rows}


def with_known(own: Histories, csv_path: Path, names: Items, join: bool) -> Histories:
    """The histories, after those that users of the domain have there where `join` says so."""
    stored = {canonical(user): items for user, items in of_domain(csv_path, names).items()}
    there = len(own.keys() & stored.keys())
    if join:
        print(f"{there:,} of {len(own):,} users are users of {csv_path}: their own come first")
        return {user: stored.get(user, []) + items for user, items in own.items()}
    if there:
        print(
            f"{there:,} users are users of {csv_path} too; the history read is the file's alone"
            " (--known join puts their own first)"
        )
    return own


def of_file(
    path: Path, finder: Finder, columns: list[str], time_format: str | None = None
) -> Histories:
    """The users of a file. A log has original ids. A CSV of lists has them too, unless an items.csv
    stands beside it: its numbers are mapped through that.

    Args:
        columns: of user, item and time in a log; empty where their names are published ones.
    Raises:
        UsageError: the file is damaged, or an item is not known.
    """
    table = open_table(path, columns, NAMES)
    names = {bare(name) for name in table.columns}
    in_lists = not columns and {"reviewerid", "asin"} <= names and "unixreviewtime" not in names
    given = dict(zip(ROLES, columns))  # user, item, time
    if not given and table.header and names <= UNTIMED:
        given["time"] = "none"
    chosen = choose_columns(table, given, "yes" if in_lists else "auto", by_columns=True)
    if chosen.time is None and not in_lists:
        print(f"{path}: no time: items are read in file order")
    options = {"one_user": True, "as_they_come": True, "mend": "--unknown skip"}
    log, _ = read_log(table, chosen, None, finder.skip, time_format=time_format, **options)
    log = log.ordered(None)
    found: dict[str, list[str]] = {user: [] for user in log.users}
    for user, item in zip(log.user, log.item):
        found[log.users[user]].append(log.items[item])
    if in_lists and not listing_of(path).is_file():
        finder.refuse_ambiguous([*found.values()], f"--users={path}")
    elif in_lists:  # its numbers were mapped to original ids
        finder = finder.by_asin()
    source = f"--users={path}"
    return {user: finder.find_all(items, f"{source}: {user}") for user, items in found.items()}
