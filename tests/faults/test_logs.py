"""Logs that would be read in another way than they are meant, and advice about them.

A case is refused in one line, or gives the right value; advice that a message gives is followed.
"""

import csv
import gzip
import json
from decimal import Decimal
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from datasets import convert
from datasets.cells import parse_list
from datasets.items import Items
from engine.errors import UsageError
from tests.conftest import save
from tests.faults.conftest import HEADER, LOG, ROWS, convert_by

pytestmark = pytest.mark.usefixtures("folder")


COLUMNS = "--user user_id --item item_id"
NUMBERS = "--user 1 --item 2 --time none"


def plain_lists() -> dict[str, list[str]]:
    """The log's lists, worked out without our code: its rows are in time order."""
    lists: dict[str, list[str]] = {}
    for user, item, _ in ROWS:
        lists.setdefault(user, []).append(item)
    return lists


def swapped() -> str:
    return "item_id,user_id,timestamp\n" + "".join(f"{i},{u},{t}\n" for u, i, t in ROWS[12:])


def last_line_cut(digits: int) -> str:
    return LOG.rstrip("\n")[:-digits] + "\n"


def zoned() -> str:
    dates = [f"2024-01-{1 + i:02d} 10:00:00" + "+05:00" * (i % 2) for i in range(24)]
    return HEADER + "".join(f"{u},{i},{date}\n" for (u, i, _), date in zip(ROWS, dates))


SPLIT = LOG.index("u0,", 200)
NUMBERED = "".join(f"{n},{u},{i},{t}\n" for n, (u, i, t) in enumerate(ROWS))
OBJECTS = '{"user_id": "a", "item_id": {"$oid": "x1"}, "timestamp": 3}\n' * 2
NOW = HEADER + "u1,1,now\nu1,2,2024-01-02\nu2,1,2024-01-03\n"
ZONED = ["u1,a,2024-01-02 08:00\nu2,b,2024-01-03 08:00\n", "u1,b,2024-01-01 08:00+09:00\n"]
CLOCK = HEADER + "u1,1,08:30\nu1,2,07:30\nu2,1,09:30\n"
HALF_DAYS = HEADER + "".join(f"{u},{i},20240225\n" for u, i, _ in ROWS[:20]) + "u1,103,1700001200\n"
MIND = 'reviewerID,asin\nu1,"[1, 2]"\nu1,"[1, 2]"\nu2,"[1, 2, 4]"\nu2,"[2, 4, 1]"\n'
CUT = 'reviewerID,asin\nu1,"[1, 2]"\nu2,"[1, 2"\n'
LOG_OF_JSON = "".join(f'{{"user_id":"{u}","item_id":{i},"timestamp":{t}}}\n' for u, i, t in ROWS)
BASKETS = LOG_OF_JSON.replace("100", "[5,7]", 1)
REFUSED = [  # the files, the first one's first part is read; words of the answer; further flags
    ({"p/a": LOG[:SPLIT], "p/b": LOG[SPLIT:]}, "p/b: lacks the column 'user_id'"),
    ({"p/a": LOG, "p/q/b": LOG}, "p: holds the folder q; put all"),
    ({"a.csv": last_line_cut(5)}, "row 25: the time is 17000, the others are dates .1 such rows"),
    ({"a.csv": LOG.replace("1700000060", "1.7E+09")}, "all its digits: a spreadsheet cut"),
    ({"a.csv": zoned()}, "row 3: .*05:00', expected a time zone in every row or in none"),
    ({"a.jsonl": OBJECTS}, "the user|the item '{.*' is an object; write its id alone", COLUMNS),
    ({"a.csv": ",0,1,2\n" + NUMBERED}, "its first row, ',0,1,2', numbers the columns; write their"),
    ({"a.csv": LOG}, "its first row has names, 'user_id,item_id,timestamp'; name the", NUMBERS),
    ({"a.csv": NOW}, "row 2: the time is 'now', expected a number or a date"),
    ({"a.json": '{\n"user_id": 1,\n"item_id": 2\n}\n'}, "first line is '{'; write a JSON"),
    ({"a.csv": "user_id;item_id;timestamp\n1,5E+15;a;1\n2;b;2\n"}, "the user '1,5E.15' was cut"),
    (
        {"a.csv": 'reviewerID,asin\nu1,"[1.5E+15, 2]"\nu2,"[1, 2]"\n'},
        "element 0 of the list is '15",
    ),
    ({"a.csv": "reviewerID,asin\nu1,[1 2 ... 3]\nu2,[1 2]\n"}, "element 2 of the list is '...'"),
    (
        {"a.csv": LOG},
        "--dedup=rows: compares times, and no",
        "--time none --dedup rows --time_format %d",
    ),
    ({"a.zst": "\x28\u00b5/\u00fd"}, "looks like zstd; unpack it first"),
    ({"z/a": HEADER + ZONED[0], "z/b": HEADER + ZONED[1]}, "row 2: .*, expected a time zone in ev"),
    ({"a.csv": HEADER + "u1,i1 i2,1\nu1,i2 i3,2\nu2,i4,3\n"}, "'i1 i2' looks like a list; --list"),
    ({"a.csv": CLOCK}, "--time_format=%H:%M: without a year times", "--time_format %H:%M"),
    ({"a.csv": CLOCK}, "%p needs %I, not %H", "--time_format '%Y %H %p'"),
    ({"a.csv": HALF_DAYS}, "rows 2 and 22 are a factor of 84 apart: two units in one column"),
    ({"a.csv": LOG.replace("1700000060", "1.7e9")}, "all its digits: a spreadsheet cut"),
    ({"a.csv": LOG + LOG}, "row 26 is the header again", "--time none"),
    ({"a.csv": "#" + LOG}, "'#user_id,item_id,timestamp' begins with # and has 3 cells"),
    ({"a.csv": LOG + "u1;104;1\n"}, "row 26 has one field, 'u1;104;1', expected 3: another sep"),
    ({"p/a": LOG, "p/_delta_log/0": "{}"}, "p: has _delta_log: some of its files may be of older"),
    ({"a.csv": CUT}, "row 3: the list '.1, 2' is not closed: was it cut", "--lists yes"),
    ({"a.jsonl": BASKETS}, "the item '.5,7.' looks like a list; --lists yes reads lists"),
    (
        {"a.csv": CUT.replace('2"\n', '2]"\n').replace("[1", "c(1")},
        "is code; write JSON",
        "--lists yes",
    ),
    ({"a.csv": "u1,x,y,z\nu2,y,x\n"}, "rows of 3 to 4 cells: a user and items", "--lists yes"),
    ({"a.csv": "#9;x;1.2.24\n8;y;1.2.24\n"}, "'#9;x;1.2.24' begins with # and has 3", NUMBERS),
    ({"a.csv": MIND}, "row 3 repeats the list of the user's row before .2 such rows"),
]


@pytest.mark.parametrize("files, line, more", [(*case, "")[:3] for case in REFUSED])
def test_a_log_that_would_be_read_in_another_way_is_refused(files, line, more):
    for path, text in files.items():
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_bytes(text.encode("latin-1"))
    with pytest.raises(UsageError, match=line):
        convert_by(f"--input {Path([*files][0]).parts[0]} {more}")
    assert not Path("data").exists()


def test_ids_stay_as_they_are_but_for_a_column_of_floats_and_rows_without_a_time_can_go(capsys):
    rows = ["u1,2.0,7", "u1,2.1,8", "u2,a  b,9", "u2,a b,NaT", "u2,2.1,"]
    save("a.csv", HEADER.strip(), *rows)
    assert convert_by("--input a.csv --drop_missing true")[1] == ["2.0", "2.1", "a  b"]
    assert "2 rows without time left out\ntimes from 7 to 9\n" in capsys.readouterr().out
    save("b.csv", HEADER.strip(), "1.0,2.0,7", "1,2,8", "3.0,4.00,9")
    assert convert_by("--input b.csv")[0] == {1: ["2", "2"], 3: ["4"]}
    save("cat.csv", "item_id,title", "2,two", "2.1,more")  # written without .0 there
    convert_by("--input a.csv --drop_missing true --items cat.csv")
    assert "0,2.0,two" in Path("data/x.items.csv").read_text()
    save("c.csv", "# FromNodeId\tToNodeId\tAt", "1\t2\t1.600000001E9", "3\t4\t1.6000000022E9")
    assert convert_by("--input c.csv --user 1 --item 2 --time 3")[0] == {1: ["2"], 3: ["4"]}
    save("d.csv", HEADER.strip(), "a,x,0", "b,y,5000000", "a,y,180000000")  # ms since the start
    assert convert_by("--input d.csv")[0] == {"a": ["x", "y"], "b": ["y"]}


def test_parts_are_read_by_the_numbers_in_their_names():
    Path("p").mkdir()
    for n in range(1, 13):
        Path("p", f"day-{n}.csv").write_text(f"user_id,item_id\na,{n}\nb,{n}\n")
    assert convert_by("--input p --time none")[0]["a"] == [str(n) for n in range(1, 13)]


def test_comments_are_skipped_in_the_parts_that_have_them():
    Path("p").mkdir()
    for name, start, rows in (("a", "# by x\n\n", ROWS[:9]), ("b", "", ROWS[9:])):
        Path("p", name).write_text(start + "".join(f"{u},{i},{t}\n" for u, i, t in rows))
    assert convert_by("--input p --user 1 --item 2 --time 3")[0] == plain_lists()
    Path("p/b").write_text("\ufeff" + Path("p/b").read_text().replace("\n", "\n\ufeff", 1))
    assert convert_by("--input p --user 1 --item 2 --time 3")[0] == plain_lists()
    lists = {user: " ".join([user, *items]) for user, items in plain_lists().items()}
    Path("lines.txt").write_text("\n".join(["# a user and items per line", *lists.values()]))
    assert convert_by("--input lines.txt --lists yes")[0] == plain_lists()
    quoted = [f'{user},"{" ".join(items)}"' for user, items in plain_lists().items()]
    Path("quoted.csv").write_text("\n".join(quoted))  # not split at blanks
    by_number = "--user 1 --item 2 --time none --lists yes"
    assert convert_by(f"--input quoted.csv {by_number}")[0] == plain_lists()


def test_ids_that_python_would_read_as_numbers_stay_text():
    lists = ("12_3, 4_5", "1_23, 4_5", "[1e3x, 0x10]", "['a b', 'c']")
    arrays = ('{"a b",c}', "{'d', 'e'}", "['f' 'g']")  # Postgres', a set, numpy's
    own = (
        "[np.int64(5), np.str_('B')]",
        "X1(R),X2(L)",
        "(500) Days|Heat (1995)",
        "(a, b)",
        7,
        7.0,
        None,
    )  # brackets of items
    found = [parse_list(Path("x"), 2, cell) for cell in lists + arrays + own]
    assert found[:4] == [["12_3", "4_5"], ["1_23", "4_5"], ["1e3x", "0x10"], ["a b", "c"]]
    assert found[4:7] == [["a b", "c"], ["d", "e"], ["f", "g"]]
    assert found[7:9] == [["5", "B"], ["X1(R)", "X2(L)"]]
    assert found[9:] == [["(500) Days", "Heat (1995)"], ["a", "b"], ["7"], ["7.0"], []]


def test_parts_without_rows_rows_without_anything_and_names_in_brackets_are_read():
    Path("p").mkdir()
    odd = LOG.replace(",100,", ",(Live),").replace(",101,", ",7e1234,")  # the second is no number
    for name, text in (("a", ""), ("b", HEADER), ("c", odd + ",,\n")):
        Path("p", name).write_text(text)
    Path("p/0.gz").write_bytes(gzip.compress(b""))
    lists, names = convert_by("--input p --drop_missing true")[:2]
    assert {"(Live)", "7e1234"} <= {*names} and [*map(len, lists.values())] == [
        *map(len, plain_lists().values())
    ]
    late = [{"user_id": u, "item_id": i, "timestamp": t} for u, i, t in ROWS]
    late[-1]["title"] = "Late"
    Path("l.jsonl").write_text("".join(json.dumps(row) + "\n" for row in late * 9))
    convert_by("--input l.jsonl")
    assert ",Late\n" in Path("data/x.items.csv").read_text()


def test_bytes_that_are_no_text_and_lone_surrogates_stay_different_ids():
    users = pa.array([b"\xff\x01", b"\xfe\x01", b"a2", b"a2"], pa.binary(2))
    table = pa.table({"user_id": users, "item_id": ["x", "y", "x", "y"], "timestamp": [1, 2, 3, 4]})
    pq.write_table(table, "b.parquet")
    assert len(convert_by("--input b.parquet")[0]) == 3
    rows = [{"user_id": u, "item_id": i, "timestamp": 1} for u in ("a", "b\ud800") for i in "xy"]
    Path("s.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows[0]["tags"] = ["\ud83d"]  # of a column that is not read
    Path("s.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [*convert_by("--input s.jsonl")[0]] == ["a", "b\\ud800"]


def test_nanoseconds_are_times_and_float32_has_cut_them():
    times = [1620000000123456789 + n * 86400 * 10**9 for n in range(len(ROWS))]
    rows = [f"{u},{i},{t}\n" for (u, i, _), t in zip(ROWS, times)]
    Path("n.csv").write_text(HEADER + "".join(rows))
    assert convert_by("--input n.csv")[0] == plain_lists()
    users, items, seconds = zip(*ROWS)
    cut = pa.array(map(float, seconds), pa.float32())
    pq.write_table(pa.table({"user_id": users, "item_id": items, "timestamp": cut}), "f.parquet")
    with pytest.raises(UsageError, match="row 1: the time is .*, expected all its digits: float32"):
        convert_by("--input f.parquet")
    with pytest.raises(UsageError, match="the item is .*, expected all its digits: float32 cut"):
        convert_by("--input f.parquet --user user_id --item timestamp --time none")
    big = pa.array([76561198000000000 + n for n in range(len(ROWS) - 1)] + [None], pa.int64())
    items = pa.array([Decimal(n % 3) for n in range(len(ROWS))], pa.decimal128(38, 10))
    pq.write_table(pa.table({"user_id": users, "item_id": items, "timestamp": big}), "d.parquet")
    lists, names = convert_by("--input d.parquet --drop_missing true")[:2]
    assert names == ["0", "1", "2"] and sum(map(len, lists.values())) == len(ROWS) - 1


def test_times_of_bigquery_and_words_for_no_title():
    rows = ["a,x,2024-04-25 08:00:00.5 UTC,\\N", "a,y,2024-04-25 08:00:00 UTC,Cup"]
    save("a.csv", HEADER.strip() + ",title", *rows, "b,x,2024-04-25 09:00:00 UTC,Mug")
    assert convert_by("--input a.csv")[0] == {"a": ["y", "x"], "b": ["x"]}
    assert Path("data/x.items.csv").read_text().splitlines()[1:] == ["0,x,Mug", "1,y,Cup"]


def test_numbers_in_lists_are_lists_of_one_and_an_output_is_no_numbering(capsys):
    rows = [{"reviewerID": u, "asin": i} for u, i in (("a", [4, 5]), ("b", 7), ("c", [5]))]
    Path("data").mkdir()
    Path("data/x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for _ in range(2):  # the second time its items.csv stands there
        found = convert_by("--input data/x.jsonl --lists yes")
        assert found[0] == {"a": ["4", "5"], "b": ["7"], "c": ["5"]}


def test_both_files_of_a_domain_are_written_or_none(monkeypatch):
    Path("a.csv").write_text(LOG)
    convert_by("--input a.csv")
    before = [path.read_bytes() for path in sorted(Path("data").iterdir())]
    Path("b.csv").write_text(LOG.replace("u0", "v0"))

    def full(self, listing):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Items, "write", full)
    with pytest.raises(OSError, match="No space"):
        convert_by("--input b.csv")
    assert [path.read_bytes() for path in sorted(Path("data").iterdir())] == before


def test_bytes_and_an_index_in_parquet_are_columns_like_others():
    users, items, times = zip(*ROWS)
    binary = [pa.array([x.encode() for x in column], pa.binary()) for column in (users, items)]
    table = pa.table({"user_id": binary[0], "item_id": binary[1], "timestamp": times})
    table = table.append_column("image", pa.array([{"bytes": b"x"}] * len(ROWS)))
    pq.write_table(table, "b.parquet")
    assert convert_by("--input b.parquet")[0] == plain_lists()
    frame = pd.DataFrame({"user_id": users, "item_id": items, "timestamp": times})
    frame.set_index("user_id").to_parquet("i.parquet")
    assert convert_by("--input i.parquet")[0] == plain_lists()


def test_quotes_between_tabs_enclose_a_whole_cell_or_are_letters():
    titles = ['"T ""1"""', '"Open', "x", 'Close"', '12" disc', '""']
    rows = [f"u{n}\ti{n}\t{n + 1}\t{title}\n" for n, title in enumerate(titles)]
    Path("a.tsv").write_text("user_id\titem_id\ttimestamp\ttitle\n" + "".join(rows))
    convert_by("--input a.tsv")
    with open("data/x.items.csv", newline="") as file:
        found = [row["title"] for row in csv.DictReader(file)]
    assert found == ['T "1"', '"Open', "x", 'Close"', '12" disc', ""]
    Path("b.csv").write_text(LOG + 'u1,"2"x,1700000000\n')
    with pytest.raises(UsageError, match="begins in line 26, .*: a quote is opened and not closed"):
        convert_by("--input b.csv")
    Path("c.tsv").write_text('user_id\titem_id\ttimestamp\tnote\tn\nu1\ti1\t1\t"a\nb"\t5\n')
    with pytest.raises(UsageError, match="c.tsv: row 2 opens a quote that the next line closes"):
        convert_by("--input c.tsv")


def test_lines_of_blanks_and_excels_line_are_no_rows():
    for text in (
        "sep=,\r\n" + LOG.replace("\n", "\r\n"),
        LOG + "   \n",
        LOG.replace("u0", "\nu0", 1),
    ):
        Path("a.csv").write_bytes(text.encode())
        assert convert_by("--input a.csv")[0] == plain_lists()


def test_parts_are_read_by_their_own_headers():
    Path("q").mkdir()
    Path("q/a.csv").write_text(HEADER + "".join(f"{u},{i},{t}\n" for u, i, t in ROWS[:12]))
    Path("q/b.csv").write_text(swapped())
    assert convert_by("--input q")[0] == plain_lists()
    Path("p").mkdir()
    Path("p/a").write_text("user_id,item_id,price,timestamp,shop\nu1,i1,4,5,s\nu2,i2,4,5,s\n")
    for text, said in (
        ("user_id,item_id,price,timestamp\nu3,i1,4,5,17\n", "p/b: row 2 has 5 fields, expected 4"),
        ("user_id,item_id,timestamp,item_id\nu3,i1,6,i9\n", "p/b: column item_id appears 2 times"),
        ("x,user_id,item_id,timestamp\n1,u3,i1\n", "the time is missing"),
    ):
        Path("p/b").write_text(text)
        with pytest.raises(UsageError, match=said):
            convert_by("--input p")


def test_a_cell_of_any_length_and_separators_within_cells_are_read():
    header, *rows = LOG.splitlines()
    for name, cell in (("img", "A" * 200_000), ("genres", "Action;Indie")):
        save("a.csv", f"{header},{name}", *(f"{row},{cell}" for row in rows))
        assert convert_by("--input a.csv")[0] == plain_lists()


def test_time_none_on_a_command_line_keeps_file_order():
    Path("back.csv").write_text(HEADER + "a,x,9\na,y,8\nb,x,9\nb,z,8\n")
    assert convert_by("--input back.csv --time none")[0] == {"a": ["x", "y"], "b": ["x", "z"]}


def test_the_columns_of_an_item_list_are_named_apart_from_the_logs():
    Path("cat.csv").write_text("sku,name\n" + "".join(f"{i},No. {i}\n" for i in range(100, 108)))
    with pytest.raises(UsageError, match="--items_columns ITEM,TITLE names others"):
        convert_by("--input orders.csv --items cat.csv")
    convert_by("--input orders.csv --items cat.csv --items_columns sku,name")
    assert "0,100,No. 100" in Path("data/x.items.csv").read_text()
    Path("u.item").write_text("".join(f"{i}|Film {i}|1995\n" for i in range(100, 108)))
    convert_by("--input orders.csv --items u.item --items_columns 1,2")
    assert "0,100,Film 100" in Path("data/x.items.csv").read_text()


def test_a_domains_own_files_are_converted_with_ids_times_and_titles():
    rows = ["a,7,1,Brazil", "a,3,2,Alien", "b,9,3,Dune", "b,7,4,"]
    path = save("log.csv", "user_id,item_id,timestamp,title", *rows)
    convert.main(input=str(path), domain_type="one")
    convert.main(input="data/one.csv", items="data/one.items.csv", domain_type="two")
    for name in ("csv", "items.csv"):
        assert Path(f"data/one.{name}").read_text() == Path(f"data/two.{name}").read_text()
    assert "1,7,Brazil" in Path("data/two.items.csv").read_text()


def test_a_list_of_items_adds_titles_and_takes_none_away():
    path = save("log.csv", "user_id,item_id,timestamp,title", "a,1,1,Alien", "b,2,2,")
    items = save("items.csv", "item_id,title", "1,", "2,Brazil")
    convert.main(input=str(path), items=str(items), domain_type="shop")
    assert Path("data/shop.items.csv").read_text().splitlines()[1:] == ["0,1,Alien", "1,2,Brazil"]
    other = save("other.csv", "item_id,title", "0001,Alien")
    with pytest.raises(UsageError, match="none of its items is in the log: '0001' there, '1' here"):
        convert.main(input=str(path), items=str(other), domain_type="x")
    with pytest.raises(UsageError, match="expected the columns item_id and titel, it has item_id"):
        columns = ["item_id", "titel"]
        convert.main(input=str(path), items=str(items), items_columns=columns, domain_type="x")


def test_repeated_rows_are_not_later_purchases(capsys):
    rows = ["a,x,1", "a,x,1", "a,y,2", "a,x,9", "b,x,1"]
    path = save("log.csv", "user_id,item_id,timestamp", *rows)
    lists = {}
    for dedup in ("no", "rows", "items"):
        convert.main(input=str(path), domain_type="shop", dedup=dedup, overwrite=True)
        lists[dedup] = Path("data/shop.csv").read_text().splitlines()[1].split('"')[1]
    assert lists == {"no": "[0, 0, 1, 0]", "rows": "[0, 1, 0]", "items": "[0, 1]"}
    told = "1 rows repeat user, item and time of another; --dedup rows drops them"
    assert told in capsys.readouterr().out


def test_a_form_of_times_can_be_named():
    rows = ["a;x;25.04.2024 08:00", "a;y;03.05.2024 08:00", "b;y;26.04.2023 08:00"]
    save("log.csv", "customer;sku;Bestellt", *reversed(rows))
    named = "--input log.csv --user customer --item sku --time Bestellt"
    with pytest.raises(UsageError, match="expected a number or a date such as .*--time_format re"):
        convert_by(named)
    lists, _ = convert_by(f"{named} --time_format '%d.%m.%Y %H:%M'")
    assert lists == {"a": ["x", "y"], "b": ["y"]}
    with pytest.raises(UsageError, match="expected a time of the form %m.%d.%Y %H:%M"):
        convert_by(f"{named} --time_format '%m.%d.%Y %H:%M'")
    with pytest.raises(UsageError, match="--time_format=%Y%Q: .*directive"):
        convert_by(f"{named} --time_format %Y%Q")


def test_titles_under_other_columns_are_offered(capsys):
    rows = ["a,x,1,Lamp", "b,y,2,Mug", "a,y,3,Mug"]
    path = save("log.csv", "buyer,sku,bought_at,title", *rows)
    named = {"user": "buyer", "item": "sku", "time": "bought_at"}
    convert.main(input=str(path), domain_type="shop", **named)
    assert "--title title reads the titles" in capsys.readouterr().out
