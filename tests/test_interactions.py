import gzip
import lzma

import numpy as np
import pytest

from datasets.domain import find_csv
from datasets.interactions import read_csv
from engine.errors import UsageError
from tests.conftest import real

GOOD = """reviewerID,asin,title
ann,"[5, 9, 5, 7]","[]"
bob,"[9]",""
cid,"[0, 7, 9, 5, 2]","[""a, 'b'""]"
"""


def test_a_small_file_reads_as_expected(tmp_path):
    path = tmp_path / "d.csv"
    path.write_text(GOOD)
    data = read_csv(path)
    assert data.users == ["ann", "cid"]
    assert data.rows.tolist() == [0, 2]
    assert data.n_short == 1
    assert data.item_ids.tolist() == [0, 2, 5, 7, 9]
    assert data.items.tolist() == [2, 4, 2, 3, 0, 3, 4, 2, 1, 4]  # bob's last
    assert data.offsets.tolist() == [0, 4, 9] and data.short_offsets.tolist() == [9, 10]


def test_compression_bom_and_line_ends_do_not_matter(tmp_path):
    (tmp_path / "a.csv").write_text(GOOD)
    (tmp_path / "b.csv.gz").write_bytes(gzip.compress(GOOD.encode()))
    (tmp_path / "c.csv.xz").write_bytes(lzma.compress(GOOD.encode()))
    (tmp_path / "d.csv").write_bytes(b"\xef\xbb\xbf" + GOOD.replace("\n", "\r\n").encode())
    a, b, c, d = (read_csv(tmp_path / name) for name in ("a.csv", "b.csv.gz", "c.csv.xz", "d.csv"))
    for other in (b, c, d):
        assert np.array_equal(a.items, other.items) and a.users == other.users
    assert a.sha256 == b.sha256 == c.sha256 != d.sha256


BAD = {
    "empty": ("", "is empty; expected a header with reviewerID,asin"),
    "wrong column": ("reviewerID,asins\nu,[1]\n", "asin; found 'reviewerID', 'asins'; python -m"),
    "a column twice": ('reviewerID,asin,asin\nu,"[1]",\n', "column asin appears 2 times"),
    "no user": ('reviewerID,asin\na,"[1, 2, 3, 4]"\n ,"[1]"\n', "row 3: reviewerID is empty"),
    "unquoted list": ("reviewerID,asin\nu,[1,2,3]\n", "4 fields, expected 2; quote the list"),
    "python list": ("reviewerID,asin\nu,\"['a','b']\"\n", "row 2: asin is \"['a','b']\", expected"),
    "empty cell": ('reviewerID,asin\nv,"[1,2,3,4]"\nu,\n', "row 3: asin is '', expected a JSON"),
    "string ids": ('reviewerID,asin\nu,"[""12""]"\n', "element 0 of asin is '12' (str)"),
    "too large": ('reviewerID,asin\nu,"[99999999999]"\n', "a whole number from 0 to 2147483646"),
    "deep": (f'reviewerID,asin\nu,"{"[" * 100000}"\n', "row 2: asin is '[[[["),
    "twice": ('reviewerID,asin\nu,"[1]"\nv,"[2]"\nu,"[3]"\n', "'u' appears in rows 2 and 4"),
    "all short": ('reviewerID,asin\nu,"[1,2,3]"\n', "no user has 4 items or more"),
    "all empty": ('reviewerID,asin\nu,"[]"\n', "every user's list is empty"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_refused_in_one_line(tmp_path, name):
    content, expected = BAD[name]
    path = tmp_path / "d.csv"
    path.write_text(content)
    with pytest.raises(UsageError) as caught:
        read_csv(path)
    assert expected in str(caught.value)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_not_utf8_damaged_and_a_directory(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"reviewerID,asin\nu\xff,[1]\n")
    with pytest.raises(UsageError, match="not UTF-8 at byte 17"):
        read_csv(tmp_path / "a.csv")
    for content in (GOOD.encode("utf-16"), bytes(range(0, 256, 3)) + b"\xff" * 200):
        (tmp_path / "a.csv").write_bytes(content)
        with pytest.raises(UsageError, match="not UTF-8 at byte"):
            read_csv(tmp_path / "a.csv")
    (tmp_path / "b.csv.gz").write_bytes(gzip.compress(GOOD.encode() * 50)[:-20])
    (tmp_path / "c.csv.xz").write_bytes(b"not xz at all")
    told = {"b.csv.gz": "damaged .gz file", "c.csv.xz": "damaged .xz file", "": "is a directory"}
    for name, said in told.items():
        with pytest.raises(UsageError, match=said):
            read_csv(tmp_path / name)


def test_where_a_domain_is_looked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="available: none"):
        find_csv("toys")
    released = tmp_path / "dataset/sequential/toys.csv"
    released.parent.mkdir(parents=True)
    released.write_text(GOOD)
    assert find_csv("toys").resolve() == released
    with pytest.raises(UsageError, match="available: toys"):
        find_csv("x")
    (tmp_path / "dataset/sequential/cloths.csv").write_text(GOOD)
    assert find_csv("cloth").name == "cloths.csv"
    own = tmp_path / "data/toys.csv.gz"
    own.parent.mkdir()
    own.write_bytes(gzip.compress(GOOD.encode()))
    assert find_csv("toys").resolve() == own
    with pytest.raises(UsageError, match="from --data_path"):
        find_csv("toys", "nowhere.csv")


def test_real_beauty_has_its_known_size():
    data = read_csv(real("amazon2014_beauty.csv.xz"))
    assert (data.n_users, data.n_items, len(data.items)) == (22363, 12101, 198502)
    assert data.item_ids[0] == 1
