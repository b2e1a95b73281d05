"""Any log becomes a domain: the same files from every form, and one line where it cannot be."""

import csv
import functools
import gzip
import json
import lzma
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from datasets import convert
from engine.errors import UsageError

# user, item, time, rating; not in time order
LOG = [("ann", "S-2", 30, 5.0), ("bob", "S-9", 5, 4.0), ("ann", "S-1", 10, 2.0)]
LOG += [("ann", "S-9", 20, 3.0), ("bob", "S-1", 5, 5.0), ("cid", "S-2", 7, 1.0)]
EXPECTED = (
    'reviewerID,asin,title,time\nann,"[0, 2, 1]","{0}","[10, 20, 30]"\n'
    'bob,"[2, 0]","{1}","[5, 5]"\ncid,[1],"{2}",[7]\n'
)
NO_TITLES = EXPECTED.format('[""""' + ', """"' * 2 + "]", '["""", """"]', '[""""]')
ITEMS = "item_id,asin,title\n0,S-1,\n1,S-2,\n2,S-9,\n"


def text(separator: str, header: str | None, with_rating: bool = True) -> str:
    lines = [separator.join(header.split())] if header else []
    for user, item, time, rating in LOG:
        cells = [user, item, str(rating), str(time)] if with_rating else [user, item, str(time)]
        lines.append(separator.join(cells))
    return "\n".join(lines) + "\n"


def written(path: Path, **flags) -> tuple[str, str]:
    convert.main(input=str(path), domain_type="shop", overwrite=True, **flags)
    return Path("data/shop.csv").read_text(), Path("data/shop.items.csv").read_text()


pytestmark = pytest.mark.usefixtures("here")


def lists_of(path: Path, **flags) -> list[list[str]]:
    """[user, list] of every line that is written."""
    return [row[:2] for row in csv.reader(written(path, **flags)[0].splitlines())][1:]


def save_text(name: str, content: str, encoding: str = "utf-8") -> Path:
    Path(name).write_text(content, encoding=encoding)
    return Path(name)


def names(user, item, time) -> dict:
    return {"user": user, "item": item, "time": time}


PUBLISHED = "user_id:token item_id:token rating:float timestamp:float"
TEXTS = {  # file, separator, header, encoding
    "comma": ("a.csv", ",", "user_id item_id rating timestamp", "utf-8"),
    "semicolon": ("a.csv", ";", "buyer movieId overall time", "utf-8"),
    "amazon": ("a.csv", ",", "reviewerID asin overall unixReviewTime", "utf-8-sig"),
    "utf16": ("a.txt", "\t", "user item rating time", "utf-16"),
    "recbole": ("a.inter", "\t", PUBLISHED, "utf-8"),
    "movielens": ("ratings.dat", "::", None, "utf-8"),
    "u.data": ("u.data", "\t", None, "utf-8"),
    "spaces": ("a.txt", " ", None, "utf-8"),
}


def write_text(form: str) -> tuple[Path, dict]:
    name, separator, header, encoding = TEXTS[form]
    first, second, _, last = header.split() if header else "1234"
    flags = {} if form in ("comma", "amazon", "recbole") else names(first, second, last)
    return save_text(name, text(separator, header), encoding), flags


def write_json_lines() -> tuple[Path, dict]:
    columns = ("user_id", "parent_asin", "timestamp", "rating")
    rows = [dict(zip(columns, row)) | {"title": "a review's", "text": "x"} for row in LOG]
    return save_text("a.jsonl", "\n".join(map(json.dumps, rows))), {}


def write_parquet() -> tuple[Path, dict]:
    users, items, times, ratings = zip(*LOG)
    columns = {"customer_id": users, "product_id": items, "date": times, "score": ratings}
    columns["date"] = pa.array(times, pa.timestamp("s"))
    columns["customer_id"] = pa.array(users).dictionary_encode()
    pq.write_table(pa.table(columns), "a.parquet")
    return Path("a.parquet"), names("customer_id", "product_id", "date")


def write_parts() -> tuple[Path, dict]:
    """As Spark writes a table: a folder of parts."""
    Path("parts").mkdir()
    lines = text(",", "user_id item_id rating timestamp").splitlines()
    for number, rows in enumerate((lines[1:3], lines[3:])):
        save_text(f"parts/part-{number}.csv", "\n".join([lines[0], *rows]))
    save_text("parts/_SUCCESS", "")
    return Path("parts"), {}


def write_compressed(opener, name: str) -> tuple[Path, dict]:
    with opener(name, "wt") as file:
        file.write(text(",", "user_id item_id rating timestamp"))
    return Path(name), {}


FORMS = {form: functools.partial(write_text, form) for form in TEXTS}
FORMS |= {
    "three columns": lambda: (save_text("a.csv", text(",", None, False)), names("1", "2", "3")),
    "parts": write_parts,
    "json lines": write_json_lines,
    "parquet": write_parquet,
    "gzip": lambda: write_compressed(gzip.open, "a.csv.gz"),
    "gzip without a suffix": lambda: write_compressed(gzip.open, "a.csv"),
    "xz": lambda: write_compressed(lzma.open, "a.csv.xz"),
}


@pytest.mark.parametrize("form", FORMS)
def test_the_same_log_in_any_form_gives_the_same_bytes(form):
    path, flags = FORMS[form]()
    assert written(path, **flags) == (NO_TITLES, ITEMS)


def test_dates_sort_as_times_and_ties_keep_file_order_or_a_hash():
    rows = "a,x,2024-03-01 08:00:00\na,y,2024-02-28T23:00:00\n"
    rows += "a,z,2024-03-01 08:00\nb,z,2024-03-01 08:00"
    path, flags = save_text("a.csv", "u,i,when\n" + rows), names("u", "i", "when")
    assert lists_of(path, **flags)[0] == ["a", "[1, 0, 2]"]
    orders = {written(path, **flags, ties="hash", tie_seed=seed)[0] for seed in range(8)}
    assert len(orders) == 2  # y first; x and z in either order


LISTS = {
    "json": '"[3, 12, 3]"',
    "strings": '"[""3"", ""12"", ""3""]"',
    "python": "\"['3', '12', '3']\"",
    "tuple": '"(3, 12, 3)"',
    "floats": '"[3.0, 12.0, 3.0]"',
    "commas": '"3,12,3"',
    "spaces": "3 12 3",
}


@pytest.mark.parametrize("cell", LISTS)
def test_a_list_per_user_in_any_form(cell):
    path = save_text("a.csv", f"reviewerID,asin\nann,{LISTS[cell]}\nbob,{LISTS[cell]}\n")
    assert lists_of(path) == [["ann", "[0, 1, 0]"], ["bob", "[0, 1, 0]"]]
    assert Path("data/shop.items.csv").read_text() == "item_id,asin,title\n0,3,\n1,12,\n"


def test_lines_of_a_user_and_their_items_and_pairs():
    long = written(save_text("s3rec.txt", "7 5 40 5 6\n12 40 5\n2 6 5 5 5\n"), lists="yes")
    pairs = "7 5\n7 40\n7 5\n7 6\n12 40\n12 5\n2 6\n2 5\n2 5\n2 5\n"
    assert long == written(save_text("sasrec.txt", pairs), **names("1", "2", "none"))
    empty = save_text("empty.txt", "7 5 40 5 6\n3\n12 40 5\n2 6 5 5 5\n")
    assert long == written(empty, lists="yes")
    letters = written(save_text("l.tsv", "u7\t5\t40\t5\t6\nu12\t40\t5\n"), lists="yes")
    assert letters[0].splitlines()[2].startswith('u7,"[0, 2, 0, 1]"')
    by_number = [["2", "[1, 0, 0, 0]"], ["7", "[0, 2, 0, 1]"], ["12", "[2, 0]"]]
    assert lists_of(empty, lists="yes") == by_number


def test_amazons_ratings_without_a_header_have_the_item_first(capsys):
    content = "B00000ABCD,A1B2C3D4,5.0,1500000100\nB00000WXYZ,A1B2C3D4,1.0,1500000050\n"
    content += "B00000WXYZ,A1B2C3D5,1.0,1500000050\n"
    lists, items = written(save_text("ratings.csv", content))
    assert "user: column 2" in capsys.readouterr().out
    assert lists.splitlines()[1].startswith('A1B2C3D4,"[1, 0]"')
    assert items.splitlines()[1] == "0,B00000ABCD,"


def test_filters_repeat_until_nothing_changes_and_say_what_is_left(capsys):
    # Without the rating below 3: item S-9 twice, S-1 once -> bob has one left, then S-9 once, ...
    rows = "a x 5\na y 5\nb x 5\nb z 5\nc x 5\nc y 1\nd x 5\nd y 5\n"
    path = save_text("a.txt", "user item rating\n" + rows)
    flags = names("user", "item", "none") | {"rating": "rating"}
    lists, _ = written(path, **flags, min_rating=2, min_user=2, min_item=2)
    said = capsys.readouterr().out
    assert "1 interactions rated below 2 left out" in said
    # c loses y, so c goes; z is alone, so b keeps one and goes; a and d stay.
    assert [line.split(",")[0] for line in lists.splitlines()[1:]] == ["a", "d"]
    assert "users with >= 2 interactions" in said and "items with >= 2 interactions" in said


NO_TIME = {"time": "none"}


def test_low_ratings_go_after_missing_users_and_leave_their_titles():
    rows = ["u1,i1,5,1,Alpha", "u2,i1,6,5,", "u2,i2,7,5,Beta", "u1,i2,8,5,", ",i1,9,,"]
    path = save_text("a.csv", "\n".join(["user_id,item_id,timestamp,rating,title", *rows]))
    lists, items = written(path, min_rating=3, drop_missing=True)
    assert [row[:2] for row in csv.reader(lists.splitlines()[1:])] == [
        ["u1", "[1]"],
        ["u2", "[0, 1]"],
    ]
    assert items == "item_id,asin,title\n0,i1,Alpha\n1,i2,Beta\n"


def test_titles_from_the_log_or_from_a_list_of_items():
    head = "user_id,item_id,title\n"
    path = save_text("a.csv", head + 'a,x,"A ""good"" mug\n(blue)"\na,y,Cup\nb,x,Mug\n')
    _, items = written(path, **NO_TIME, title="title")
    assert items == 'item_id,asin,title\n0,x,"A ""good"" mug (blue)"\n1,y,Cup\n'
    log = save_text("b.csv", "user_id,item_id\n1,10\n1,2\n2,2\n")
    movies = 'item_id:token\tmovie_title:token_seq\n2\tHeat\n10\tToy "Story"\n11\tOther\n'
    _, items = written(log, **NO_TIME, items=str(save_text("b.item", movies)))
    assert items == 'item_id,asin,title\n0,2,Heat\n1,10,"Toy ""Story"""\n'
    meta = '{"parent_asin": "2", "title": "A &amp; B"}\n{"parent_asin": "10", "title": null}\n'
    _, items = written(log, **NO_TIME, items=str(save_text("m.jsonl", meta)))
    assert items == "item_id,asin,title\n0,2,A & B\n1,10,\n"
    plain = save_text("movies.dat", "2::Heat (1995)::Action\n10::Toys::Comedy\n")
    lines = written(log, **NO_TIME, items=str(plain))[1].splitlines()
    assert lines[1] == "0,2,Heat (1995)"


def test_the_first_title_that_is_there_counts_and_quotes_may_be_letters():
    head = "user_id,item_id,timestamp,title\n"
    path = save_text("a.csv", head + "u1,i1,1,\nu2,i1,2,Mug\nu2,i2,3,Cup\n")
    assert written(path)[1] == "item_id,asin,title\n0,i1,Mug\n1,i2,Cup\n"
    head = "user_id\titem_id\ttimestamp\ttitle\n"
    tabs = save_text("b.tsv", head + 'u\t1\t1\t"Crocodile" Dundee\nv\t2\t2\tAlien\nu\t3\t3\t"W\n')
    titles = [line.split(",", 2)[2] for line in written(tabs)[1].splitlines()[1:]]
    assert titles == ['"""Crocodile"" Dundee"', "Alien", '"""W"']


WRONG = {
    "empty user": ("a,x,1\n,y,2\n", "a.csv: row 3: the user is missing (column user_id, 1 rows;"),
    "header alone": ("", "a.csv: holds no interaction"),
    "short": ("a,x,1\nb,y\n", "a.csv: row 3: the time is missing"),
    "bad time": ("a,x,1\nb,y,soon\n", "row 3: the time is 'soon', expected a number"),
    "one user": ("a,x,1\na,y,2\n", "one user in all, 'a': is column user_id the user?"),
    "units": ("a,x,1700000000\nb,y,1700000000000\n", "rows 2 and 3 are a factor of 1,000 apart"),
    "a list": ('a,x,1\nb,"[1, 2]",2\n', "the item '[1, 2]' looks like a list; --lists yes"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_was_read_is_judged_and_nothing_is_written(case):
    content, message = WRONG[case]
    save_text("a.csv", "user_id,item_id,timestamp\n" + content)
    with pytest.raises(UsageError) as refused:
        convert.main(input="a.csv", domain_type="shop")
    assert message in str(refused.value) and len(str(refused.value)) < 300
    assert not Path("data").exists()


WIDE = [f"u{i % 9},i{i % 7},4,5,{1_600_000_000 + i}" for i in range(99)]
TWO_KINDS = [{"user_id": i, "item_id": i, "timestamp": t} for i, t in ((1, 17e8), (2, "2001-1-1"))]
FORMLESS = {
    "two kinds": ("\n\n".join(map(json.dumps, TWO_KINDS)), "row 3: the time is '2001-1-1', exp"),
    "wide": (
        "\n".join(["user_id,item_id,rating,timestamp", *WIDE]),
        "row 2 has 5 fields, expected 4: is the sep",
    ),
    "empty": ("", "a.csv: is empty"),
    "title": ("Orders 2020\nuser_id,item_id,timestamp\na,x,1\nb,y,2\n", "a title? remove it"),
    "array": ('[{"user_id": 1}]', "looks like one JSON array; write a JSON object per line"),
    "json": ('{"user_id": "a", "item_id": "x", "timestamp": 1}\n{{"u": 1}}\n', "row 2: not a JSON"),
    "no text": ("ARROW1\0\0", "holds bytes that are no text; save it as CSV"),
    "latin": ("user_id,item_id,timestamp\na,x,1\nb,\xe4,2\n", "not UTF-8; save it as UTF-8"),
}


@pytest.mark.parametrize("case", FORMLESS)
def test_a_file_of_no_known_form_is_one_line(case):
    content, message = FORMLESS[case]
    save_text("a.csv", content, "latin-1")
    with pytest.raises(UsageError) as refused:
        convert.main(input="a.csv", domain_type="shop")
    assert message in str(refused.value) and not Path("data").exists()


def test_a_header_that_is_not_known_is_asked_for():
    save_text("a.csv", "buyer,who sold,article id,bought\nu1,s,i1,2024-01-02\nu2,s,i2,2024-01-01\n")
    with pytest.raises(UsageError) as refused:
        convert.main(input="a.csv", domain_type="shop")
    message = str(refused.value)
    assert "which column is the user, the item, the time?" in message
    assert "article id ('i1', 'i2')" in message
    assert message.endswith(
        "Name them: --user NAME --item NAME --time NAME (none keeps file order)"
    )
    named = {"user": "buyer", "item": "article id", "time": "bought"}
    convert.main(input="a.csv", domain_type="shop", **named)
    assert Path("data/shop.csv").exists()


MISSING = [
    r"\N",
    r"NA",
    r"N/A",
    r"<NA>",
    r"NaT",
    r"none",
    r"undefined",
    r"-",
    "(null)",
    "#N/A",
    "?",
]


@pytest.mark.parametrize("word", MISSING)
def test_words_for_a_missing_user_are_missing(word, capsys):
    path = save_text("a.csv", f"user_id,item_id,timestamp\na,x,1\n{word},y,2\nb,y,3\n")
    with pytest.raises(UsageError, match="row 3: the user is missing"):
        convert.main(input="a.csv", domain_type="shop")
    lists, _ = written(path, drop_missing=True)
    assert [line.split(",")[0] for line in lists.splitlines()[1:]] == ["a", "b"]
    assert "1 rows without user left out" in capsys.readouterr().out


def test_what_is_unusual_is_said(capsys):
    rows = [f"u{i},i{i % 7},{i},{i % 2},9" for i in range(40)]
    rows += [f"u1,i{i % 7},{i + 100},1,9" for i in range(10)]
    head = "# exported today\nuser_id,item_id,timestamp,click,rating"
    written(save_text("a.csv", "\n".join([head, *rows])))
    said = capsys.readouterr().out
    for line in (
        "skipped the comment '# exported today'",
        "not read: click, rating",
        "click has 0 and 1: if 0 means that nothing happened, --rating click --min_rating 1",
        "rating looks like a rating: --min_rating leaves low ones out",
        "the user 'u1' has 11 of 50 interactions: a shared account",
    ):
        assert line in said
    lists, _ = written(Path("a.csv"), rating="click", min_rating=1)  # what was advised
    assert len(lists.splitlines()) == 1 + 20


def test_baskets_are_sorted_by_their_time():
    lines = '{"c": "u", "b": ["x", "y"], "t": 9}\n{"c": "u", "b": ["z"], "t": 3}\n'
    path = save_text("a.jsonl", lines + '{"c": "v", "b": ["x"], "t": 1}\n')
    flags = {"user": "c", "item": "b", "time": "t", "lists": "yes"}
    assert lists_of(path, **flags) == [["u", "[2, 0, 1]"], ["v", "[0]"]]


def test_bad_requests_are_refused():
    save_text("a.csv", "user_id,item_id,timestamp\na,x,1\nb,y,2\n")
    for flags, message in (
        ({"user": "buyer"}, "--user=buyer: a.csv has no such column; it has user_id ('a', 'b'),"),
        ({"min_rating": 3.0}, "--min_rating=3.0: a.csv has no rating; name it with --rating"),
        ({"items": "none.csv"}, "--items=none.csv: file not found"),
        ({"min_user": 9}, "of 2 after 'users with >= 9 interactions'; lower --min_user"),
        ({"user": "item_id"}, "cannot be both user and item"),
    ):
        with pytest.raises(UsageError) as refused:
            convert.main(input="a.csv", domain_type="shop", **flags)
        assert message in str(refused.value)
    convert.main(input="a.csv", domain_type="shop")
    with pytest.raises(UsageError, match="already exists; --overwrite replaces it"):
        convert.main(input="a.csv", domain_type="shop")
    for own in ("data/shop.csv", "data/shop.items.csv"):
        with pytest.raises(UsageError, match=f"--input={own} is the file to be written"):
            convert.main(input=own, domain_type="shop", overwrite=True)


@pytest.mark.parametrize("there", ["data/shop.items.csv", "data/shop.csv.gz"])
def test_no_file_of_a_domain_is_replaced_or_hidden_unasked(there):
    log = save_text("a.csv", "user_id,item_id,timestamp\na,x,1\nb,y,2\n")
    Path("data").mkdir()
    Path(there).write_text("mine")
    with pytest.raises(UsageError, match=f"{there} already exists; --overwrite"):
        convert.main(input=str(log), domain_type="shop")
    assert Path(there).read_text() == "mine" and not Path("data/shop.csv").exists()


def test_titles_over_several_lines_in_a_file_of_many_blocks():
    rows = [f'u{i % 100},i{i % 50},{i},"one\ntwo\n\nthree"' for i in range(140_000)]
    path = save_text("a.csv", "\n".join(["user_id,item_id,timestamp,title", *rows]))
    lists, items = written(path)
    assert len(items.splitlines()) == 51 and items.splitlines()[1] == "0,i0,one two three"
    lengths = [len(json.loads(row[1])) for row in list(csv.reader(lists.splitlines()))[1:]]
    assert sum(lengths) == 140_000


def test_lists_and_names_of_two_words_are_kept_apart():
    mixed = save_text("a.csv", 'reviewerID,asin\n1,"1,2,3"\n2,"5"\n3,"7,8"\n')
    assert lists_of(mixed) == [["1", "[0, 1, 2]"], ["2", "[3]"], ["3", "[4, 5]"]]
    shirts = save_text("b.csv", "user_id,item_id\nu1,Blue Shirt\nu1,Red Shirt\nu2,Blue Shirt\n")
    assert lists_of(shirts, **NO_TIME) == [["u1", "[0, 1]"], ["u2", "[0]"]]
    columns = {"user": "user_id", "item": "item_id", "lists": "yes"}
    assert lists_of(shirts, **columns)[0] == ["u1", "[0, 2, 1, 2]"]
    bars = save_text("c.csv", "user_id,item_id\nu1,Red Shirt | Blue Shirt\nu2,Blue Shirt|Hat\n")
    assert lists_of(bars, **columns) == [["u1", "[2, 0]"], ["u2", "[0, 1]"]]
    one = save_text("d.csv", 'reviewerID,asin\nu1,"Red Shirt, Blue Mug"\nu2,"Blue Mug"\n')
    assert lists_of(one) == [["u1", "[1, 0]"], ["u2", "[0]"]]


def test_headers_are_found_where_they_are():
    blank = save_text("a.csv", "\n\nuser_id,item_id,timestamp\nu1,i1,1\nu2,i2,2\n")
    assert lists_of(blank) == [["u1", "[0]"], ["u2", "[1]"]]
    number = save_text("b.csv", "user_id,item_id,timestamp,1\nu1,i1,3,9\nu1,i2,1,9\nu2,i2,1,9\n")
    assert lists_of(number)[0] == ["u1", "[1, 0]"]
    index = save_text("c.csv", ",user_id,item_id,timestamp,\n0,u1,i1,3,\n1,u1,i2,1,\n2,u2,i2,1,\n")
    assert lists_of(index)[0] == ["u1", "[1, 0]"]
    once = save_text("e.csv", "alice,matrix\nbob,dune\n")
    assert lists_of(once, **names("1", "2", "none")) == [["alice", "[1]"], ["bob", "[0]"]]


def test_an_items_csv_of_ours_gives_titles_by_the_original_ids():
    save_text("own.items.csv", "item_id,asin,title\n0,3,three\n1,1,one\n")
    log = save_text("a.csv", "user_id,item_id\nu,0\nu,1\nv,3\n")
    items = written(log, **NO_TIME, items="own.items.csv")[1]
    assert items == "item_id,asin,title\n0,0,\n1,1,one\n2,3,three\n"
    save_text("meta.json", "{'asin': '3', 'title': 'drei'}\n{'asin': '9', 'title': 'x'}\n")
    assert written(log, **NO_TIME, items="meta.json")[1].splitlines()[3] == "2,3,drei"


def test_ids_are_the_same_through_floats_signs_and_blanks():
    columns = {"user_id": [-7.0, -7.0, 2.0], "item_id": [12345678901.0, 2.0, 2.0]}
    pq.write_table(pa.table(columns), "a.parquet")
    plain = save_text("a.csv", "user_id,item_id\n-7.0,12345678901\n-7,2.0\n2,2\n")
    rows = [(-7, 12345678901.0), (-7.0, 2), (2, 2)]
    lines = [json.dumps({"user_id": user, "item_id": item}) for user, item in rows]
    blank = save_text("a.jsonl", "\n\n".join(lines))
    found = [written(path, **NO_TIME) for path in (Path("a.parquet"), plain, blank)]
    assert found[0] == found[1] == found[2]
    assert lists_of(plain, **NO_TIME)[0] == ["-7", "[1, 0]"]


def dated(form: str, count: int = 320) -> list[str]:
    """So many times, a day and a half apart from 2020-09-13, in a form of strftime."""
    times = [datetime.fromtimestamp(1.6e9 + 131_000 * i, UTC) for i in range(count)]
    return [time.strftime(form) for time in times]


TIMES = {
    "a sixth is 0": (["0" if i % 6 == 0 else str(1_600_000_000 + i) for i in range(99)], "is 0, "),
    "or 1970": (["1970-01-01 00:00:00", *dated("%Y-%m-%d %H:%M:%S")], "time is 0, the others are"),
    "too long": ([f"2024042512000090{i:04d}" for i in range(99)], "at most 2.63"),
    "years last": (["280524", "270524"] * 9, "look like days before years"),
    "a clock": (dated("%H%M"), "look like a clock .HHMM. without a date"),
    "two forms": ([*dated("%Y%m%d"), *dated("%Y%m%d%H%M%S")], "of 8 and of more digits"),
    "days first": (dated("%d%m%Y"), "look like days before years and do not sort"),
    "months, days, years": (["010524", "042523", "120123"] * 9, "look like days before years"),
    "years first": (dated("%Y%m%d"), None),
    "spreadsheet days": ([str(42_100 + 3 * i) for i in range(320)], None),
    "weeks": ([str(201_001 + i % 52) for i in range(320)], None),
    "a count": ([str(i) for i in range(320)], None),
    "from 0": ([str(i * 86_400) for i in range(320)], None),
}


@pytest.mark.parametrize("case", TIMES)
def test_times_that_would_sort_wrongly_are_refused(case):
    times, said = TIMES[case]
    rows = [f"u{i % 9},i{i % 7},{time}" for i, time in enumerate(times)]
    path = save_text("times.csv", "\n".join(["user_id,item_id,timestamp", *rows]) + "\n")
    if said is None:
        written(path)
        return
    with pytest.raises(UsageError, match=said):
        written(path)
    assert not Path("data").exists()
