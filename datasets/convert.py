"""A log of interactions -> data/<domain>.csv and data/<domain>.items.csv.

    python -m datasets.convert --input ratings.csv --domain_type shop
    python -m datasets.convert --input log.parquet --domain_type shop \
        --user buyer --item sku --time bought_at
    python -m datasets.convert --input checkins.txt --domain_type city --user 1 --item 5 --time 2
    python -m datasets.convert --input ml-100k.inter --items ml-100k.item --domain_type ml \
        --min_rating 4 --min_user 5 --min_item 5
    python -m datasets.convert --input lists.csv --domain_type shop        # a list per user

These are read as they are: Amazon reviews (2014, 2018, 2023), MovieLens, RecBole, lists of items
per user (`reviewerID,asin`), and a header of `user_id,item_id,timestamp[,rating][,title]`. Of any
other table, parquet or JSON lines, `--user`, `--item` and `--time` name the columns. What is read
is judged before anything is written. Each user's items are sorted by time; users and items by id.
"""

from pathlib import Path
from typing import Literal

import numpy as np

from datasets import filters
from datasets.columns import NAMES, ROLES, choose_columns, report_columns
from datasets.domain import canonical_domain
from datasets.filters import Log, often, print_counts
from datasets.interactions import MINIMUM_LENGTH
from datasets.items import listing_of
from datasets.logs import read_log, read_titles
from datasets.tables import open_table
from engine import cli
from engine.cli import NonNegativeInt, PositiveInt, flag
from engine.files import check_writable

Dedup = Literal["no", "rows", "items"]


def filter_log(
    log: Log, ties: np.ndarray | None, dedup: Dedup, min_user: int, min_item: int, min_length: int
) -> Log:
    """Sort by user and time; then drop repeats, rare users and items, and short sequences, until
    nothing changes. Prints a line after every filter.
    """
    log = log.ordered(ties)
    if dedup != "no":
        same = ("user", "item", "time") if dedup == "rows" else ("user", "item")
        log = filters.keep(log, ~log.repeated(*same), f"repeated {dedup} dropped", "dedup")
    rules = [
        ("users", "user", min_user, "min_user"),
        ("items", "item", min_item, "min_item"),
        ("lists", "user", min_length, "min_length"),
    ]
    changes = True
    while changes:
        changes = False
        for what, column, least, flag_name in rules:
            kept = often(getattr(log, column), least)
            if not kept.all():
                changes, stage = True, f"{what} with >= {least} interactions"
                log = filters.keep(log, kept, stage, flag_name)
    return log


@cli.command
def main(
    *,
    input: str = flag(help="the log, or a folder of its parts"),
    domain_type: str = flag(help="name of the domain, and so of the files written"),
    items: str | None = flag(None, "a list of items with titles, where the log has none"),
    items_columns: list[str] = flag([], "its columns of items and titles, as sku,name or 1,2"),
    user: str | None = flag(None, "name of the user column; without a header its number, from 1"),
    item: str | None = flag(None, "the same of the item column"),
    time: str | None = flag(None, "the same of the time column; none keeps file order"),
    time_format: str | None = flag(None, "of dates that are not ISO 8601, such as %d.%m.%Y %H:%M"),
    rating: str | None = flag(None, "the same of the rating column"),
    title: str | None = flag(None, "the same of the title column"),
    lists: Literal["auto", "yes", "no"] = flag("auto", "whether a row has a user's list of items"),
    drop_missing: bool = flag(False, "leave out rows without user, item, time or rating"),
    min_rating: float | None = flag(None, "lowest rating kept; by default ratings are not read"),
    min_user: PositiveInt = flag(1, "fewest interactions of a user"),
    min_item: PositiveInt = flag(1, "fewest interactions of an item"),
    min_length: PositiveInt = flag(1, "shortest list, after the other filters"),
    dedup: Dedup = flag(
        "no", "drop rows that repeat user, item and time, or a user's later repeats of an item too"
    ),
    ties: Literal["file", "hash"] = flag(
        "file", "interactions of one user and time: in file order, or by a hash of user and item"
    ),
    tie_seed: NonNegativeInt = flag(0, "seed of that hash", needs="ties=hash"),
    output_dir: str = flag("data", "where the files go"),
    overwrite: bool = flag(False, "replace the domain's files"),
) -> None:
    """Turn a log of interactions into a domain's sequences."""
    path = Path(output_dir) / f"{canonical_domain(domain_type)}.csv"
    listing, source = listing_of(path), Path(input)
    targets = {path.resolve(), listing.resolve()}
    check_writable(Path(output_dir), "--output_dir")
    cli.check(
        (source.exists(), f"--input={input}: file not found"),
        (items is None or Path(items).is_file(), f"--items={items}: file not found"),
        filters.may_write(path, overwrite),
        (source.resolve() not in targets, f"--input={input} is the file to be written"),
        (not items or Path(items).resolve() not in targets, f"--items={items} would be replaced"),
        (not path.is_dir() and not listing.is_dir(), f"{path} or {listing} is a folder"),
        (
            source.resolve() != path.parent.resolve() or not source.is_dir(),
            f"--output_dir={output_dir} is the folder that is read; name another",
        ),
        (
            len(items_columns) in (0, 2) and bool(items or not items_columns),
            f"--items_columns={','.join(items_columns)}: two columns of --items, item and title",
        ),
    )
    given = {"user": user, "item": item, "time": time, "rating": rating, "title": title}
    table = open_table(source, [n for n in given.values() if n], NAMES, lists == "yes")
    columns = choose_columns(table, given, lists)
    dated, rated = columns.time is not None, columns.rating is not None
    cli.check(
        (
            rated or min_rating is None,
            f"--min_rating={min_rating}: {input} has no rating; name it with --rating",
        ),
        (
            dated or dedup != "rows",
            "--dedup=rows: compares times, and none are read; give items, or no",
        ),
    )
    report_columns(table, columns, min_rating)
    drop = ROLES if drop_missing else ()
    log, titles = read_log(table, columns, min_rating, drop, time_format=time_format)
    print_counts("read", log)
    twice = int(log.repeated("user", "item", "time").sum()) if dated else 0
    if twice and dedup == "no":
        print(f"{twice:,} rows repeat user, item and time of another; --dedup rows drops them")
    by_hash = filters.tie_order(log, tie_seed) if ties == "hash" else None
    kept = filter_log(log, by_hash, dedup, min_user, min_item, min_length)
    if dated:
        filters.print_ties(kept, "interactions", ties, tie_seed)
    if items is not None:
        titles |= read_titles(Path(items), items_columns, filters.occurring(kept))
    lengths = np.bincount(kept.user)
    short = int(((lengths > 0) & (lengths < MINIMUM_LENGTH)).sum())
    if short:
        print(f"{short:,} users have fewer than {MINIMUM_LENGTH} items: they are not evaluated")
    filters.write_domain(kept, titles, path, dated)


if __name__ == "__main__":
    cli.run(main)
