"""Raw Amazon reviews and metadata -> data/<domain>.csv and data/<domain>.items.csv.

    python -m datasets.process --reviews Sports_and_Outdoors_5.json.gz \
        --meta meta_Sports_and_Outdoors.json.gz --domain_type sport
    python -m datasets.process --reviews R.json.gz --meta M.json.gz --domain_type gift --min_item 5
    python -m datasets.process --reviews R.json.gz --domain_type sport --order file    # as released

The filters are the released notebook's, in its order: rating, rows per user, rows per item, length,
repeats, length again. Reviews are dated by day. Those of one user and day stand in an order that
says nothing about the item (`--ties hash`), since raw files are in item order. Items are numbered
in the order of their ASINs. Reviews are read as a stream. About 24 bytes per review and the names
of users and items stay in memory.
"""

from pathlib import Path
from typing import Literal

import numpy as np

from datasets import filters
from datasets.columns import Columns
from datasets.domain import canonical_domain
from datasets.filters import Log, keep, often, print_counts
from datasets.logs import Advice, read_log, read_titles
from datasets.tables import open_table
from engine import cli
from engine.cli import NonNegativeFloat, NonNegativeInt, PositiveInt, flag
from engine.files import check_writable

OTHERS = "python -m datasets.convert reads other logs"
ADVICE = Advice("remove these rows", OTHERS, OTHERS, OTHERS, OTHERS)
REVIEWS = {"user": "reviewerID", "item": "asin", "time": "unixReviewTime", "rating": "overall"}


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
    table = open_table(Path(reviews))
    lacking = [name for name in REVIEWS.values() if name not in table.columns]
    cli.check((not lacking, f"--reviews={reviews}: has no {', '.join(lacking)}; {OTHERS}"))
    columns = Columns(**REVIEWS, title=None, lists=None)
    raw, _ = read_log(table, columns, min_rating, ("user", "item"), advice=ADVICE)
    raw = raw.as_met()
    print_counts(f"rating >= {min_rating:g}", raw)
    by_time = order == "time"
    by_hash = filters.tie_order(raw, tie_seed) if ties == "hash" and by_time else None
    kept = filter_reviews(raw, min_user, min_item, min_length, by_hash, by_time)
    if by_time:
        filters.print_ties(kept, "reviews", ties, tie_seed)
    titles = (
        read_titles(Path(meta), ["asin", "title"], filters.occurring(kept), ADVICE) if meta else {}
    )
    filters.write_domain(kept, titles, path)


if __name__ == "__main__":
    cli.run(main)
