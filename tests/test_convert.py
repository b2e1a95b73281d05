"""Any log becomes a domain: the same files from every form, and one line where it cannot be."""

import csv
import gzip
import json
import lzma
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from datasets import convert
from datasets.interactions import read_csv
from engine.errors import UsageError
from tests.conftest import ROOT

CASES = ROOT.parent / "shared" / "cases"
LOG = [  # user, item, time, rating; not in time order
    ("ann", "S-2", 30, 5.0),
    ("bob", "S-9", 5, 4.0),
    ("ann", "S-1", 10, 2.0),
    ("ann", "S-9", 20, 3.0),
    ("bob", "S-1", 5, 5.0),
    ("cid", "S-2", 7, 1.0),
]
EXPECTED = 'reviewerID,asin,title\nann,"[0, 2, 1]","{0}"\nbob,"[2, 0]","{1}"\ncid,[1],"{2}"\n'
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


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def save_text(name: str, content: str, encoding: str = "utf-8") -> Path:
    Path(name).write_text(content, encoding=encoding)
    return Path(name)


FORMS = {
    "comma": lambda: save_text("a.csv", text(",", "user_id item_id rating timestamp")),
    "semicolon": lambda: save_text("a.csv", text(";", "userId movieId overall time")),
    "tab": lambda: save_text("a.tsv", text("\t", "uid asin stars unixReviewTime")),
    "bom": lambda: save_text("a.csv", text(",", "reviewerID ASIN rating ts"), "utf-8-sig"),
    "utf16": lambda: save_text("a.txt", text("\t", "user item rating time"), "utf-16"),
    "recbole": lambda: save_text(
        "a.inter", text("\t", "user_id:token item_id:token rating:float timestamp:float")
    ),
    "movielens": lambda: save_text("ratings.dat", text("::", None)),
    "u.data": lambda: save_text("u.data", text("\t", None)),
    "three columns": lambda: save_text("a.csv", text(",", None, with_rating=False)),
    "spaces": lambda: save_text("a.txt", text(" ", None)),
}


def write_json_lines() -> Path:
    names = ("user_id", "parent_asin", "timestamp", "rating")
    rows = [dict(zip(names, row)) | {"title": "a review's", "text": "x"} for row in LOG]
    return save_text("a.jsonl", "\n".join(map(json.dumps, rows)))


def write_parquet() -> Path:
    users, items, times, ratings = zip(*LOG)
    columns = {"customer_id": users, "product_id": items, "date": times, "score": ratings}
    columns["date"] = pa.array(times, pa.timestamp("s"))
    columns["customer_id"] = pa.array(users).dictionary_encode()
    pq.write_table(pa.table(columns), "a.parquet")
    return Path("a.parquet")


def write_compressed(opener, name: str) -> Path:
    with opener(name, "wt") as file:
        file.write(text(",", "user_id item_id rating timestamp"))
    return Path(name)


FORMS |= {
    "json lines": write_json_lines,
    "parquet": write_parquet,
    "gzip": lambda: write_compressed(gzip.open, "a.csv.gz"),
    "gzip without a suffix": lambda: write_compressed(gzip.open, "a.csv"),
    "xz": lambda: write_compressed(lzma.open, "a.csv.xz"),
}


@pytest.mark.parametrize("form", FORMS)
def test_the_same_log_in_any_form_gives_the_same_bytes(form):
    assert written(FORMS[form]()) == (NO_TITLES, ITEMS)


def test_dates_sort_as_times_and_ties_keep_file_order_or_a_hash():
    rows = [
        "u,i,when",
        "a,x,2024-03-01 08:00:00",
        "a,y,2024-02-28T23:00:00Z",
        "a,z,2024-03-01 08:00",
    ]
    path = save_text("a.csv", "\n".join(rows))
    lists, _ = written(path, user="u", item="i", time="when")
    assert lists.splitlines()[1].startswith('a,"[1, 0, 2]"')
    orders = {
        written(path, user="u", item="i", time="when", ties="hash", tie_seed=seed)[0]
        for seed in range(8)
    }
    assert len(orders) == 2  # y first; x and z in either order


LISTS = {
    "json": '"[3, 12, 3]"',
    "strings": '"[""3"", ""12"", ""3""]"',
    "python": "\"['3', '12', '3']\"",
    "tuple": '"(3, 12, 3)"',
    "floats": '"[3.0, 12.0, 3.0]"',
    "commas": '"3,12,3"',
    "spaces": "3 12 3",
    "bars": "3|12|3",
}


@pytest.mark.parametrize("cell", LISTS)
def test_a_list_per_user_in_any_form(cell):
    path = save_text("a.csv", f"reviewerID,asin\nann,{LISTS[cell]}\nbob,{LISTS[cell]}\n")
    lists, items = written(path)
    assert [row[:2] for row in csv.reader(lists.splitlines())][1:] == [
        ["ann", "[0, 1, 0]"],
        ["bob", "[0, 1, 0]"],
    ]
    assert items == "item_id,asin,title\n0,3,\n1,12,\n"


def test_lines_of_a_user_and_their_items_and_pairs():
    long = written(save_text("s3rec.txt", "7 5 40 5 6\n12 40 5\n2 6 5 5 5\n"))
    pairs = "7 5\n7 40\n7 5\n7 6\n12 40\n12 5\n2 6\n2 5\n2 5\n2 5\n"
    assert long == written(save_text("sasrec.txt", pairs))
    assert long == written(save_text("empty.txt", "7 5 40 5 6\n3\n12 40 5\n2 6 5 5 5\n"))
    assert [row[:2] for row in csv.reader(long[0].splitlines())][1:] == [
        ["2", "[1, 0, 0, 0]"],  # users by number: 2, 7, 12
        ["7", "[0, 2, 0, 1]"],
        ["12", "[2, 0]"],
    ]


def test_amazons_ratings_without_a_header_have_the_item_first(capsys):
    content = "B00000ABCD,A1B2C3D4,5.0,100\nB00000WXYZ,A1B2C3D4,1.0,50\n"
    lists, items = written(save_text("ratings.csv", content))
    assert "user: column number 2" in capsys.readouterr().out
    assert lists.splitlines()[1].startswith('A1B2C3D4,"[1, 0]"')
    assert items.splitlines()[1] == "0,B00000ABCD,"


def test_filters_repeat_until_nothing_changes_and_say_what_is_left(capsys):
    # Without the rating below 3: item S-9 twice, S-1 once -> bob has one left, then S-9 once, ...
    rows = "a x 5\na y 5\nb x 5\nb z 5\nc x 5\nc y 1\nd x 5\nd y 5\n"
    path = save_text("a.txt", "user item rating\n" + rows)
    lists, _ = written(path, min_rating=2, min_user=2, min_item=2)
    said = capsys.readouterr().out
    assert "1 interactions rated below 2 left out" in said
    # c loses y, so c goes; z is alone, so b keeps one and goes; a and d stay.
    assert [line.split(",")[0] for line in lists.splitlines()[1:]] == ["a", "d"]
    assert "users with >= 2 interactions" in said and "items with >= 2 interactions" in said


def test_repeats_are_kept_unless_dedup():
    path = save_text("a.csv", "user,item,time\na,x,3\na,y,2\na,x,1\n")
    assert '"[0, 1, 0]"' in written(path)[0]
    assert '"[0, 1]"' in written(path, dedup=True)[0]


def test_titles_from_the_log_or_from_a_list_of_items():
    path = save_text("a.csv", 'user,item,title\na,x,"A ""good"" mug\n(blue)"\na,y,Cup\nb,x,Mug\n')
    _, items = written(path)
    assert items == 'item_id,asin,title\n0,x,"A ""good"" mug (blue)"\n1,y,Cup\n'
    log = save_text("b.csv", "user,item\n1,10\n1,2\n")
    movies = 'item_id:token\tmovie_title:token_seq\n2\tHeat\n10\tToy "Story"\n11\tOther\n'
    _, items = written(log, items=str(save_text("b.item", movies)))
    assert items == 'item_id,asin,title\n0,2,Heat\n1,10,"Toy ""Story"""\n'
    meta = '{"parent_asin": "2", "title": "A &amp; B"}\n{"parent_asin": "10", "title": null}\n'
    _, items = written(log, items=str(save_text("m.jsonl", meta)))
    assert items == "item_id,asin,title\n0,2,A & B\n1,10,\n"
    plain = save_text("movies.dat", "2::Heat (1995)::Action\n10::Toys::Comedy\n")
    assert written(log, items=str(plain))[1].splitlines()[1] == "0,2,Heat (1995)"


WRONG = {
    "empty user": ("user,item\na,x\n,y\n", "a.csv: row 3: the user is empty"),
    "empty item": ("user,item\na,x\nb,\n", "a.csv: row 3: the item is empty"),
    "ragged": ("user,item\na,x\nb,y,z\n", "a.csv: row 3 has 3 fields, expected 2"),
    "no names": (
        "who,what\na,x\n",
        "a.csv: which column is the user and the item? found who, what;",
    ),
    "bad time": (
        "user,item,time\na,x,1\nb,y,soon\n",
        "row 3: the time is 'soon', expected a number",
    ),
    "bad date": ("user,item,time\na,x,1.2.2020\nb,y,2.2.2020\n", "row 2: the time is '1.2.2020'"),
    "twice": ("user,item,item\na,x,y\n", "a.csv: column item appears 2 times"),
    "empty": ("", "a.csv: is empty"),
    "header alone": ("user,item\n", "a.csv: holds no interaction"),
    "half an id": ('user,asin\na,"[1.5, 2]"\n', "row 2: element 0 of the list is '1.5'"),
    "json": ('{"user": "a", "item": "x"}\n{"user": \n', "a.csv: row 2: not a JSON object"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_bad_file_is_one_line_and_writes_nothing(case):
    content, message = WRONG[case]
    save_text("a.csv", content)
    with pytest.raises(UsageError) as refused:
        convert.main(input="a.csv", domain_type="shop")
    assert message in str(refused.value) and len(str(refused.value)) < 300
    assert not Path("data").exists()


def test_bad_requests_are_refused():
    save_text("a.csv", "user,item\na,x\n")
    save_text("items.csv", "item,name\nx,Lamp\n")
    for flags, message in (
        ({"user": "buyer"}, "--user=buyer: a.csv has no such column; found user, item"),
        ({"min_rating": 3.0}, "--min_rating=3.0: a.csv has no rating; name it with --rating"),
        ({"min_rating": 3.0, "lists": "yes"}, "--min_rating=3.0: a.csv has no rating"),
        ({"items": "none.csv"}, "--items=none.csv: file not found"),
        ({"items": "items.csv", "title": "nam"}, "--title=nam: neither a.csv nor items.csv has"),
        ({"min_user": 9}, "nothing is left after 'users with >= 9'; lower --min_user"),
    ):
        with pytest.raises(UsageError) as refused:
            convert.main(input="a.csv", domain_type="shop", **flags)
        assert message in str(refused.value)
    convert.main(input="a.csv", domain_type="shop")
    with pytest.raises(UsageError, match="already exists; --overwrite replaces it"):
        convert.main(input="a.csv", domain_type="shop")
    with pytest.raises(UsageError, match="--input=data/shop.csv is the file to be written"):
        convert.main(input="data/shop.csv", domain_type="shop", overwrite=True)


def test_times_and_ratings_of_lists_are_refused_or_said_to_be_unread(capsys):
    content = 'user,item,time,stars\na,"[1, 2]",5,4\nb,"[2, 1]",6,3\n'
    log = str(save_text("a.csv", content))
    for flags in ({"time": "time"}, {"rating": "stars"}):
        [(name, value)] = flags.items()
        with pytest.raises(UsageError, match=f"--{name}={value}: lines of a.csv are lists"):
            convert.main(input=log, domain_type="shop", **flags)
    convert.main(input=log, domain_type="shop")
    assert "time is not read: lines are lists" in capsys.readouterr().out


@pytest.mark.parametrize("there", ["data/shop.items.csv", "data/shop.csv.gz"])
def test_no_file_of_a_domain_is_replaced_or_hidden_unasked(there):
    log = save_text("a.csv", "user,item\na,x\n")
    Path("data").mkdir()
    Path(there).write_text("mine")
    with pytest.raises(UsageError, match=f"{there} already exists; --overwrite"):
        convert.main(input=str(log), domain_type="shop")
    assert Path(there).read_text() == "mine" and not Path("data/shop.csv").exists()


def test_a_list_of_items_with_one_column_is_refused():
    log = save_text("a.csv", "user,item\na,x\n")
    listing = save_text("items.txt", "x\ny\n")
    with pytest.raises(UsageError, match="expected columns such as item_id and title"):
        convert.main(input=str(log), items=str(listing), domain_type="shop")


SAME = ["tab", "semicolon_excel", "floats", "strings_of_numbers", "comma_no_brackets"]
SAME += ["space_separated", "gz_without_suffix", "utf16_excel"]


LOOKS = {"utf16_excel": "it looks like UTF-16", "gz_without_suffix": "it looks like gzip without"}


@pytest.mark.parametrize("name", SAME)
def test_public_cases_of_one_log_are_the_same_domain(name):
    path = CASES / "csv" / f"{name}.csv"
    if not path.exists():
        pytest.skip(f"cases not here: {path}")
    with pytest.raises(UsageError, match="python -m datasets.convert --input .* makes one") as no:
        read_csv(path)
    assert LOOKS.get(name, "") in str(no.value)
    lists, items = written(path)
    assert (lists, items) == written(CASES / "csv" / "inter.inter")
    data = read_csv(Path("data/shop.csv"))
    assert (data.n_users, data.n_items, data.offsets[-1]) == (60, 40, 371)


PUBLIC = {
    "shop_log.csv": (120, 147, 595),
    "csv/ratings.dat": (60, 40, 371),
    "csv/sasrec_pairs.txt": (60, 40, 371),
    "csv/s3rec_lines.txt": (60, 40, 371),
    "csv/single_quotes_strings.csv": (60, 40, 371),
    "csv/nine_digit_ids.csv": (400, 300, 3208),
    "raw/v2023.jsonl": (40, 12, 280),
    "raw/ratings_only.csv": (40, 12, 280),
    "raw/movielens.dat": (40, 12, 280),
}


@pytest.mark.parametrize("name", PUBLIC)
def test_public_cases_are_read_whole(name):
    path = CASES / name
    if not path.exists():
        pytest.skip(f"cases not here: {path}")
    lists, items = written(path)
    users = [json.loads(row[1]) for row in list(csv.reader(lists.splitlines()))[1:]]
    found = len(users), len(items.splitlines()) - 1, sum(map(len, users))
    assert found == PUBLIC[name]


def lists_of(path: Path, **flags) -> list[list[str]]:
    """[user, list] of every line that is written."""
    return [row[:2] for row in csv.reader(written(path, **flags)[0].splitlines())][1:]


def test_titles_over_several_lines_in_a_file_of_many_blocks():
    rows = [f'u{i % 100},i{i % 50},{i},"one\ntwo\n\nthree"' for i in range(60_000)]
    path = save_text("a.csv", "\n".join(["user_id,item_id,timestamp,title", *rows]))
    lists, items = written(path)
    assert len(items.splitlines()) == 51 and items.splitlines()[1] == "0,i0,one two three"
    assert (
        sum(len(json.loads(row[1])) for row in list(csv.reader(lists.splitlines()))[1:]) == 60_000
    )


def test_a_quote_that_is_not_closed_is_named():
    rows = ["user,item,title", 'a,x,"open', *(f"u{i},y,z" for i in range(200))]
    save_text("a.csv", "\n".join(rows))
    with pytest.raises(
        UsageError, match=r"row 2: title goes over \d+ lines; is a quote not closed"
    ):
        convert.main(input="a.csv", domain_type="shop")


def test_lists_and_names_of_two_words_are_unique_names():
    mixed = save_text("a.csv", 'user_id,asin\n1,"1,2,3"\n2,"5"\n3,"7,8"\n')
    assert lists_of(mixed) == [["1", "[0, 1, 2]"], ["2", "[3]"], ["3", "[4, 5]"]]
    names = save_text("b.csv", "user,item\nu1,Blue Shirt\nu1,Red Shirt\nu2,Blue Shirt\n")
    assert lists_of(names) == [["u1", "[0, 1]"], ["u2", "[0]"]]
    assert lists_of(names, lists="yes")[0] == ["u1", "[0, 2, 1, 2]"]
    dated = save_text("c.csv", 'user,asin,date\nu1,"[1, 2]",2024-01-01\nu2,"[2]",2024-01-01\n')
    assert lists_of(dated) == [["u1", "[0, 1]"], ["u2", "[1]"]]
    late = "user,item,time\n" + "a,x,1\n" * 60 + 'b,"[1, 2]",2\n'
    with pytest.raises(UsageError, match="the item '\\[1, 2\\]' looks like a list; --lists yes"):
        convert.main(input=str(save_text("d.csv", late)), domain_type="late")
    lines = save_text("e.txt", "1 10 20\n2 30 10\n3 20 40\n")
    assert lists_of(lines, lists="yes")[0] == ["1", "[0, 1]"]


def test_headers_are_found_where_they_are():
    blank = save_text("a.csv", "\n\nuser_id,item_id\nu1,i1\nu1,i2\n")
    assert lists_of(blank) == [["u1", "[0, 1]"]]
    number = save_text("b.csv", "user_id,item_id,timestamp,1\nu1,i1,3,9\nu1,i2,1,9\n")
    assert lists_of(number) == [["u1", "[1, 0]"]]
    index = save_text("c.csv", ",user_id,item_id,timestamp,\n0,u1,i1,3,\n1,u1,i2,1,\n")
    assert lists_of(index) == [["u1", "[1, 0]"]]
    pairs = save_text("d.txt", "alice matrix\nalice dune\nbob dune\n")
    assert lists_of(pairs) == [["alice", "[1, 0]"], ["bob", "[0]"]]
    once = save_text("e.csv", "alice,matrix\nbob,dune\n")
    assert lists_of(once, header="no") == [["alice", "[1]"], ["bob", "[0]"]]
    clicks = save_text(
        "f.dat", "1,2014-04-07T10:51:09.277Z,21,0\n1,2014-04-07T10:50:09.277Z,22,0\n"
    )
    assert lists_of(clicks) == [["1", "[1, 0]"]]


def test_the_first_title_that_is_there_counts():
    path = save_text("a.csv", "user,item,time,title\nu1,i1,1,\nu2,i1,2,Mug\nu2,i1,3,Cup\n")
    assert written(path)[1] == "item_id,asin,title\n0,i1,Mug\n"
    tabs = save_text(
        "b.tsv", 'user\titem\ttitle\nu\t1\t"Crocodile" Dundee\nu\t2\tAlien\nu\t3\t"Weird\n'
    )
    assert [line.split(",", 2)[2] for line in written(tabs)[1].splitlines()[1:]] == [
        '"""Crocodile"" Dundee"',
        "Alien",
        '"""Weird"',
    ]


def test_an_items_csv_of_ours_gives_titles_by_the_original_ids():
    save_text("own.items.csv", "item_id,asin,title\n0,3,three\n1,1,one\n")
    log = save_text("a.csv", "user,item\nu,0\nu,1\nu,3\n")
    items = written(log, items="own.items.csv")[1]
    assert items == "item_id,asin,title\n0,0,\n1,1,one\n2,3,three\n"
    save_text("meta.json", "{'asin': '3', 'title': 'drei'}\n{'asin': '9', 'title': 'x'}\n")
    assert written(log, items="meta.json")[1].splitlines()[3] == "2,3,drei"


def test_ids_are_the_same_through_floats_signs_and_blanks():
    pq.write_table(
        pa.table({"user": [-7.0, -7.0, None][:2], "item": [12345678901.0, 2.0]}), "a.parquet"
    )
    text = save_text("a.csv", "user,item\n-7.0,12345678901\n-7,2.0\n")
    lines = save_text(
        "a.jsonl", '{"user": -7, "item": 12345678901.0}\n\n{"user": -7.0, "item": 2}\n'
    )
    assert written(Path("a.parquet")) == written(text) == written(lines)
    assert lists_of(text) == [["-7", "[1, 0]"]]
    save_text("b.csv", "user,item\nnan,x\na,y\n")
    with pytest.raises(UsageError, match="row 2: the user is empty"):
        convert.main(input="b.csv", domain_type="b")


def test_one_kind_of_time_in_a_file():
    rows = [1700000000, "2001-01-01"]
    lines = "\n\n".join(json.dumps({"user": 1, "item": t, "time": t}) for t in rows)
    save_text("a.jsonl", lines)
    with pytest.raises(UsageError, match="row 3: the time is '2001-01-01', expected a number"):
        convert.main(input="a.jsonl", domain_type="shop")
    save_text("b.csv", "user,item,time\na,x,1\nb,y,inf\n")
    with pytest.raises(UsageError, match="row 3: the time is 'inf'"):
        convert.main(input="b.csv", domain_type="shop")


def test_requests_that_would_spoil_files_are_refused():
    pq.write_table(
        pa.Table.from_arrays([pa.array(["a"])] * 3, ["user", "item", "item"]), "a.parquet"
    )
    save_text("data", "a file")
    save_text("b.csv", "user,item\na,x\n")
    for flags, message in (
        ({"input": "a.parquet", "output_dir": "d"}, "a.parquet: column item appears 2 times"),
        ({"input": "b.csv"}, "--output_dir=data: data is a file"),
        ({"input": "b.csv", "output_dir": "d", "user": "item"}, "cannot be both user and item"),
    ):
        with pytest.raises(UsageError, match=message):
            convert.main(domain_type="shop", **flags)
    convert.main(input="b.csv", domain_type="shop", output_dir="d")
    with pytest.raises(UsageError, match="d/shop.items.csv is the file to be written"):
        own = {"domain_type": "shop", "output_dir": "d", "overwrite": True}
        convert.main(input="d/shop.items.csv", **own)
