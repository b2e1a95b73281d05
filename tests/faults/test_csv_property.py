"""Any text as a sequence CSV: read as a plain reader reads it, or refused in one line."""

import csv
import io
import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from datasets.interactions import LARGEST_ID, MINIMUM_LENGTH, read_csv
from engine.errors import UsageError

SETTINGS = settings(
    max_examples=600, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
large = st.sampled_from([LARGEST_ID, LARGEST_ID + 1, 10**25])
numbers = st.one_of(
    st.integers(-2, 40), large, st.floats(), st.booleans(), st.none(), st.text(max_size=3)
)
cells = st.one_of(
    st.lists(st.integers(0, 40), min_size=0, max_size=8).map(json.dumps),
    st.lists(numbers, max_size=6).map(json.dumps),
    st.recursive(numbers, lambda inner: st.lists(inner, max_size=3)).map(json.dumps),
    st.text(max_size=12),
)
names = st.one_of(st.text("abcdefgh", min_size=1, max_size=4), st.text(max_size=4))
headers = st.one_of(
    st.just(["reviewerID", "asin"]),
    st.just(["asin", "title", "reviewerID"]),
    st.lists(st.text(max_size=6), max_size=4),
)


@st.composite
def tables(draw):
    """A written table: header, rows of about its width, quoting and line ends of some kind."""
    header = draw(headers)
    text, ends = io.StringIO(), draw(st.sampled_from(["\n", "\r\n"]))
    quoting = draw(st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]))
    writer = csv.writer(text, lineterminator=ends, quoting=quoting)
    writer.writerow(header)
    for _ in range(draw(st.integers(0, 6))):
        row = {"reviewerID": draw(names), "asin": draw(cells)}
        fields = [row.get(name, "x") for name in header]
        writer.writerow(fields + ["y"] if draw(st.integers(0, 30)) == 0 else fields)
    return ("\ufeff" if draw(st.booleans()) else "") + text.getvalue()


def plainly(text):
    """Users and items by the csv and json modules; None where the contract refuses the file."""
    rows = list(csv.reader(io.StringIO(text.removeprefix("\ufeff"), newline="")))
    if not rows or not {"reviewerID", "asin"} <= {name.strip() for name in rows[0]}:
        return None
    header = [name.strip() for name in rows[0]]
    if header.count("reviewerID") > 1 or header.count("asin") > 1:
        return None
    found = {}
    for fields in rows[1:]:
        if not fields:
            continue
        if len(fields) != len(header) or fields[header.index("reviewerID")] in found:
            return None
        try:
            items = json.loads(fields[header.index("asin")])
        except (ValueError, RecursionError):
            return None
        whole = isinstance(items, list) and all(type(item) is int for item in items)
        if not whole or not all(0 <= item <= LARGEST_ID for item in items):
            return None
        if not fields[header.index("reviewerID")].strip():
            return None
        found[fields[header.index("reviewerID")]] = items
    if impossible([items for items in found.values() if items]):
        return None
    kept = {user: items for user, items in found.items() if len(items) >= MINIMUM_LENGTH}
    return kept or None


def impossible(lists):
    """Data of valid form that cannot be meant: one item, or a run of item 0 at an end of three."""
    at_start = sum(items[:2] == [0, 0] for items in lists)
    at_end = sum(items[-2:] == [0, 0] for items in lists)
    return len({item for items in lists for item in items}) == 1 or max(at_start, at_end) >= 3


def check(data: bytes, expected) -> None:
    path = Path("property.csv")
    path.write_bytes(data)
    try:
        found = read_csv(path)
    except UsageError as refusal:
        assert expected is None, refusal
        assert str(refusal).startswith("property.csv") and "\n" not in str(refusal)
        return
    parts = zip(found.offsets[:-1], found.offsets[1:])
    items = [found.item_ids[found.items[a:b]].tolist() for a, b in parts]
    assert dict(zip(found.users, items)) == expected


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("property"))
        yield


@SETTINGS
@given(tables())
def test_a_table_is_read_as_a_plain_reader_reads_it_or_refused(text):
    try:
        data = text.encode()
    except UnicodeEncodeError:  # a lone surrogate cannot be in a file
        return
    check(data, plainly(text))
