"""Raw Amazon reviews and metadata -> data/<domain>.csv and data/<domain>.items.csv.

    python -m datasets.process --reviews Sports_and_Outdoors_5.json.gz \
        --meta meta_Sports_and_Outdoors.json.gz --domain_type sport
    python -m datasets.process --reviews R.json.gz --meta M.json.gz --domain_type gift --min_item 5
    python -m datasets.process --reviews R.json.gz --domain_type sport --order file    # as released

The filters are the released notebook's, in its order: rating, rows per user, rows per item, length,
repeats, length again. Reviews are dated by day. Those of one user and day stand in an order that
says nothing about the item (`--ties hash`), since raw files are in item order. Items are numbered
in the order of their ASINs. Reviews are read as a stream. About 16 bytes per review and the names
of users and items stay in memory.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd

from datasets import filters
from datasets.cells import clean_title
from datasets.domain import canonical_domain
from datasets.filters import Log, keep, often, print_counts
from datasets.tables import Names, open_table
from engine import cli
from engine.cli import NonNegativeFloat, NonNegativeInt, PositiveInt, flag
from engine.errors import UsageError
from engine.files import check_writable

BROKEN_SHARE = 0.01  # more broken lines than this are an error
SURROGATE = re.compile("[\ud800-\udfff]")  # cannot be written


def read_reviews(path: str | Path, min_rating: float) -> tuple[Log, int]:
    """Stream a review file; reviews rated below `min_rating` are left out.

    Returns:
        the reviews, and how many were rated too low.
    Raises:
        UsageError: missing, damaged, or more than 1 % broken lines (the first one is named).
    """
    users, items = Names(str), Names(str)
    parts, low = [], 0
    numbers = ("overall", "unixReviewTime")
    for frame in _records(Path(path), ("reviewerID", "asin"), numbers):
        rated = frame[frame["overall"] >= min_rating]
        low += len(frame) - len(rated)
        codes = users.encode(rated["reviewerID"]), items.encode(rated["asin"])
        parts.append((*codes, rated["unixReviewTime"].to_numpy(np.float64).astype(np.int64)))
    user, item, time = (np.concatenate(column) for column in zip(*parts))
    asins, item = items.in_order(item)
    return Log([*users.codes], asins, user, item, time), low


def filter_reviews(
    reviews: Log,
    min_user: int,
    min_item: int,
    min_length: int,
    ties: np.ndarray | None,
    by_time: bool = True,
) -> Log:
    """The released filters in their order. The result is sorted as `Log.ordered` says."""
    log = reviews.ordered(ties, by_time)
    log = keep(log, ~log.repeated("user", "item", "time"), "duplicate reviews dropped", "min_user")
    log = keep(log, often(log.user, min_user), f"users with >= {min_user} reviews", "min_user")
    log = keep(log, often(log.item, min_item), f"items with >= {min_item} reviews", "min_item")
    log = keep(log, often(log.user, min_length), f"sequences of >= {min_length}", "min_length")
    log = keep(log, ~log.repeated("user", "item"), "repeats inside a user dropped", "min_length")
    stage = f"sequences of >= {min_length} again"
    return keep(log, often(log.user, min_length), stage, "min_length")


def read_titles(path: str | Path, items: set[str]) -> tuple[dict[str, str], int]:
    """Clean titles of these items; of an item's records the first with a title counts.

    Returns:
        asin -> title, and how many repeated records there were.
    """
    titles: dict[str, str] = {}
    repeats = 0
    for frame in _records(Path(path), ("asin",), optional=("title",)):
        for asin, title in zip(frame["asin"], frame["title"]):
            if asin in items:
                repeats += asin in titles
                titles[asin] = titles.get(asin) or clean_title(title)
    return titles, repeats


def _records(
    path: Path,
    texts: tuple[str, ...],
    numbers: tuple[str, ...] = (),
    optional: tuple[str, ...] = (),
) -> Iterator[pd.DataFrame]:
    """The whole records of a file of JSON lines, many at a time.

    A line is broken where it is no object or lacks a text or a number. Broken lines are reported.
    """
    broken, first, n = 0, 0, 0
    checks = dict.fromkeys(texts, _is_text) | dict.fromkeys(numbers, _is_number)
    for frame in open_table(path, lenient=True).frames([*checks, *optional]):
        whole = np.ones(len(frame), dtype=bool)
        for name, holds in checks.items():
            whole &= np.array([*map(holds, frame[name])])
        if not whole.all():
            first = first or int(frame.index[whole.argmin()])
        broken, n = broken + int((~whole).sum()), n + len(frame)
        yield frame[whole]
    if broken > BROKEN_SHARE * n:
        raise UsageError(
            f"{path}: {broken:,} of {n:,} lines are broken or lack"
            f" {', '.join(checks)}, the first is line {first}; is it the right file?"
        )
    if broken:
        print(f"{path}: skipped {broken:,} broken lines of {n:,}, the first is line {first}")


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value) and not SURROGATE.search(value)


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and abs(value) < 2**53  # NaN is not


@cli.command
def main(
    *,
    reviews: str = flag(help="the review file, a JSON object per line"),
    meta: str | None = flag(None, "the metadata file, for titles; without it titles are empty"),
    domain_type: str = flag(help="name of the domain, and so of the files written"),
    min_rating: NonNegativeFloat = flag(3, "lowest rating kept"),
    min_user: PositiveInt = flag(5, "fewest reviews of a user"),
    min_item: PositiveInt = flag(20, "fewest reviews of an item"),
    min_length: PositiveInt = flag(5, "shortest sequence"),
    order: Literal["time", "file"] = flag(
        "time", "sequences by time, or in file order as released"
    ),
    ties: Literal["hash", "file"] = flag(
        "hash", "reviews of one user and time: by a hash of user and item, or in file order"
    ),
    tie_seed: NonNegativeInt = flag(0, "seed of that hash", needs="ties=hash"),
    output_dir: str = flag("data", "where the files go"),
    overwrite: bool = flag(False, "replace the domain's files"),
) -> None:
    """Turn raw Amazon reviews (v1 or v2, plain, .gz or .xz) into a domain's sequences."""
    path = Path(output_dir) / f"{canonical_domain(domain_type)}.csv"
    cli.check(
        (Path(reviews).is_file(), f"--reviews={reviews}: file not found"),
        (meta is None or Path(meta).is_file(), f"--meta={meta}: file not found"),
        filters.may_write(path, overwrite),
    )
    check_writable(Path(output_dir), "--output_dir")
    raw, low = read_reviews(reviews, min_rating)
    print(f"{low:,} reviews rated below {min_rating:g} left out")
    stage = f"rating >= {min_rating:g}"
    print_counts(stage, raw)
    emptied = f"{reviews}: nothing is left of {low:,} reviews after '{stage}'; lower --min_rating"
    cli.check((len(raw.user) > 0, emptied))
    by_time = order == "time"
    by_hash = filters.tie_order(raw, tie_seed) if ties == "hash" and by_time else None
    kept = filter_reviews(raw, min_user, min_item, min_length, by_hash, by_time)
    if by_time:
        filters.print_ties(kept, "reviews", ties, tie_seed)
    titles, repeats = read_titles(meta, filters.occurring(kept)) if meta else ({}, 0)
    if repeats:
        print(f"{repeats:,} repeated metadata records ignored")
    filters.write_domain(kept, titles, path)


if __name__ == "__main__":
    cli.run(main)
