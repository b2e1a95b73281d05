"""A table in a file or a folder of parts, as a stream of frames: text, parquet, JSON lines."""

import bz2
import contextlib
import csv
import gzip
import io
import itertools
import json
import lzma
import re
import zlib
from collections.abc import Container, Iterable, Iterator, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import orjson
import pandas as pd
import pyarrow as pa
import pyarrow.parquet
from tqdm import tqdm

from datasets.cells import parsed
from engine.errors import UsageError

SAMPLE_BYTES, SAMPLE_ROWS, LONGEST_LINE = 2**18, 50, 2**26
SMALL_PACKED = 100  # bytes; a packed file of nothing is smaller
BATCH = 2**17  # rows of a frame
SEPARATORS = ("::", "\t", ";", ",", "|", " ")
BY_LETTERS = ("::", "\t")  # between these a quote is a letter, except around a whole cell
ENCLOSED = re.compile(r'"(?:[^"]|"")*"')
MAGIC = {b"\x1f\x8b": gzip.open, b"\xfd7zXZ": lzma.open, b"BZh": bz2.open}
UTF16 = (b"\xff\xfe", b"\xfe\xff")
CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")  # of bytes that are no text
COMMENT = re.compile(r"#|sep=.?$")  # the second is Excel's
NUMBER = re.compile(r"-?\d+(\.\d*)?([eE][+-]?\d+)?|\d{4}-\d\d-\d\d.*")
DAMAGED = (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error, pa.ArrowException)
UNREAD = {  # what a file starts with -> what it is, and what to do
    b"PK\x03\x04": "a zip or Excel file; save it as CSV",
    b"\x28\xb5\x2f\xfd": "zstd; unpack it first (zstd -d)",
    b"SQLite format 3": "an SQLite database; export the table as CSV",
}
VERSIONED = ("_delta_log", ".hoodie", "_temporary")  # in a folder: which parts count
SAVE_AS_UTF8 = "save it as UTF-8 (iconv -f WINDOWS-1252 -t UTF-8)"


csv.field_size_limit(2**31 - 1)  # a cell may hold an image


def bare(name: str) -> str:
    """A column's name without RecBole's type and without case."""
    return name.split(":")[0].strip().lower()


class Table(NamedTuple):
    """What a file looks like.

    kind: text, lines ("user item item ..."), json or parquet. parts: the files that are read.
    columns: names; without a header their numbers from 1. sample: the first rows, as text by
        column.
    """

    path: Path
    parts: list[Path]
    kind: str
    separator: str
    encoding: str
    header: bool
    columns: list[str]
    sample: list[dict[str, str]]

    def cells(self, column: str) -> list[str]:
        """The first cells of a column that are not empty."""
        return [row[column] for row in self.sample if row.get(column)]

    def shown(self) -> str:
        """The columns with two values each, for messages."""
        texts = []
        for name in self.columns[:8]:
            values = ", ".join(repr(cell[:20]) for cell in self.cells(name)[:2])
            texts.append(f"{name} ({values})")
        return ", ".join(texts) + (f" and {len(self.columns) - 8} more" * (len(self.columns) > 8))

    def describe(self) -> str:
        if self.kind != "text":
            return self.kind
        first = [*self.sample[0].values()] if self.sample else []
        header = "with a header" if self.header else f"without a header; first row: {first}"
        return f"split at {self.separator!r}, {header}"[:120]

    def frames(self, columns: list[str]) -> Iterator[pd.DataFrame]:
        """The columns of the file, many rows at a time; the index has their rows in the file, from
        1, which is a header's. Raises UsageError: the file is damaged or a row has another number
        of fields.
        """
        readers = {"text": _text, "lines": _lines, "json": _json, "parquet": _parquet}
        options = {"unit": "row", "unit_scale": True, "mininterval": 1.0, "dynamic_ncols": True}
        for part in self.parts:
            table = self._replace(path=part)
            try:
                frames = readers[self.kind](table, list(dict.fromkeys(columns)))
                with tqdm(desc=part.name, **options) as bar:
                    for frame in frames:
                        yield frame
                        bar.update(len(frame))
            except DAMAGED as error:
                raise UsageError(f"{part}: damaged ({str(error)[:100]})") from None
            except UnicodeError:
                way = SAVE_AS_UTF8
                with _opened(part) as file:
                    is_utf16 = file.read(2) in UTF16
                if is_utf16:
                    way = "the first part is not UTF-16 as this one is; save all parts alike"
                raise UsageError(f"{part}: not UTF-8; {way}") from None
            except KeyError as error:
                raise UsageError(f"{part}: lacks the column {error}") from None


def open_table(
    path: Path, named: Sequence[str] = (), known: Container[str] = (), in_lines: bool = False
) -> Table:
    """Tell a file's form from its first rows.

    Args:
        known: names of which one makes the first row a header.
        named: columns that the user names; whole numbers mean that there is no header.
        in_lines: whether text without a header is "user item item ...".
    Raises:
        UsageError: it is empty, damaged, or of a form that is not read here.
    """
    parts = [path]
    if path.is_dir():
        versioned = [name for name in VERSIONED if (path / name).exists()]
        if versioned:
            raise UsageError(
                f"{path}: has {versioned[0]}: some of its files may be of older versions, or of a"
                " failed job; write the present rows into a new folder"
            )
        parts = sorted((p for p in path.iterdir() if p.name[0] not in "._"), key=_by_number)
        parts = [part for part in parts if not part.is_file() or _has_bytes(part)]
        inner = next((part for part in parts if part.is_dir()), None)
        if inner is not None or not parts:
            found = f"holds the folder {inner.name}" if inner else "a folder without files"
            raise UsageError(f"{path}: {found}; put all parts into one folder")
    if not parts[0].is_file():
        raise UsageError(f"{parts[0]}: is no file on disk; save it as one")
    first = parts[0]
    try:
        with open(first, "rb") as raw:
            start = raw.read(4)
        if start == b"PAR1":
            return _look_at_parquet(path, parts)
        with _opened(first) as file:
            head = file.read(SAMPLE_BYTES) + file.readline(LONGEST_LINE)
    except DAMAGED as error:
        raise UsageError(f"{first}: damaged ({str(error)[:100]})") from None
    except OSError as error:
        raise UsageError(f"{first}: cannot be read ({error.strerror or error})") from None
    for magic, what in UNREAD.items():
        if head.startswith(magic):
            raise UsageError(f"{first}: looks like {what}")
    encoding = "utf-16" if head[:2] in UTF16 else "utf-8-sig"
    if encoding != "utf-16" and b"\0" in head.partition(b"\n")[0]:
        raise UsageError(f"{first}: holds bytes that are no text; save it as CSV in UTF-8")
    text = io.StringIO(head.decode(encoding, "replace"), newline=None)  # ends lines as readers do
    lines = [line.rstrip("\n") for line in text]
    every = [*_from_first_row(lines)]
    skipped = [line for line in lines[: len(lines) - len(every)] if line.startswith("#")]
    rows = [*filter(str.strip, every)]
    if not rows:
        raise UsageError(f"{first}: is empty{', but for lines that begin with #' * bool(skipped)}")
    if rows[0].lstrip().startswith("{"):
        return _look_at_json(path, parts, encoding, rows)
    if rows[0].lstrip().startswith("[") and not rows[0].lstrip().startswith("[["):
        raise UsageError(f"{first}: looks like one JSON array; write a JSON object per line")
    table = _look_at_text(path, parts, encoding, rows, named, known, in_lines)
    _refuse_hidden(table, skipped, bool(named))
    return table


def _refuse_hidden(table: Table, comments: list[str], named: bool) -> None:
    """Refuse a comment before the first row that looks like a row, or like the header of a file
    that has none: as many cells, and numbers among them, or digits and no blank behind its #.
    """
    n = len(table.columns)
    for line in comments if n > 1 else ():
        cells = [cell.strip() for cell in _split(line, table.separator)]
        attached = bool(re.match(r"#\S.*\d", line)) and not table.header
        numbers = not (table.header or named) or any(map(NUMBER.fullmatch, cells[1:]))
        alike = len(cells) == n and (attached or (numbers and table.separator != " "))
        if alike or (attached and table.separator == " " and len(cells) > 1):
            raise UsageError(
                f"{table.parts[0]}: {line[:60]!r} begins with # and has {len(cells)} cells: a"
                " comment, or a header or row? remove the line, or its #"
            )


def _has_bytes(part: Path) -> bool:
    """Whether a file holds anything once it is unpacked."""
    size = part.stat().st_size
    if size >= SMALL_PACKED:
        return True
    with contextlib.suppress(OSError, *DAMAGED), _opened(part) as file:
        return bool(file.read(1))
    return True


def _by_number(part: Path) -> list:
    """A key for names in which day-2 comes before day-10."""
    return [int(text) if text.isdecimal() else text for text in re.split(r"(\d+)", part.name)]


def _from_first_row(lines: Iterable[str], path: Path | None = None) -> Iterator[str]:
    """The lines without what stands before the first row: blank ones, and comments, which are
    printed with their file's `path`.
    """
    lines = iter(lines)
    for line in lines:
        if line.strip() and not COMMENT.match(line.strip()):
            return itertools.chain([line], lines)
        if line.strip() and path is not None:
            print(f"{path}: skipped the comment {line.strip()[:60]!r}")
    return lines


def _look_at_parquet(path: Path, parts: list[Path]) -> Table:
    file = pa.parquet.ParquetFile(parts[0])
    batch = next(file.iter_batches(batch_size=SAMPLE_ROWS), None)
    columns = file.schema_arrow.names
    _refuse_twice(parts[0], columns)
    rows = [] if batch is None else batch.to_pylist()
    return Table(path, parts, "parquet", "", "", True, columns, [*map(_texts, rows)])


def _look_at_json(path: Path, parts: list[Path], encoding: str, lines: list[str]) -> Table:
    rows = [row for row in map(_parsed, lines) if row is not None]
    if not rows:
        raise UsageError(
            f"{path}: its first line is {lines[0][:40]!r}; write a JSON object per line"
        )
    columns = list(dict.fromkeys(name for row in rows for name in row))
    sample = [*map(_texts, rows[:SAMPLE_ROWS])]
    return Table(path, parts, "json", "", encoding, True, columns, sample)


def _parsed(line: str) -> dict[str, Any] | None:
    """The JSON object of a line; None for anything else. Amazon's metadata of 2014 are Python
    literals, and other files have what strict JSON refuses: NaN, lone surrogates, huge numbers.
    """
    try:
        row = orjson.loads(line)
    except orjson.JSONDecodeError:
        row = parsed(line)
    return row if isinstance(row, dict) else None


def _texts(row: dict[str, Any]) -> dict[str, str]:
    return {name: "" if value is None else str(_cell(value)) for name, value in row.items()}


def _cell(value: Any) -> Any:
    """A JSON or parquet value; a list or an object as JSON text, bytes as UTF-8."""
    if isinstance(value, bytes):
        text = value.decode("utf-8", "backslashreplace")  # different bytes stay different
        return value.hex() if CONTROL.search(text) else text
    if isinstance(value, Decimal):
        return f"{value:f}"  # not 0E-10
    if isinstance(value, list | dict):
        try:
            return orjson.dumps(value, _text_of, orjson.OPT_NON_STR_KEYS).decode()
        except TypeError:  # lone surrogates
            return json.dumps(value, default=_text_of)
    return value


def _text_of(value: Any) -> str:
    """A value inside a list that JSON does not have, such as bytes or a decimal."""
    return _cell(value) if isinstance(value, bytes) else str(value)


def _look_at_text(
    path: Path,
    parts: list[Path],
    encoding: str,
    every: list[str],
    named: Sequence[str],
    known: Container[str],
    in_lines: bool,
) -> Table:
    lines = every[: SAMPLE_ROWS + 1]
    separator = _separator(path, lines)
    rows = [_split(line, separator) for line in lines]
    named = [name for name in named if name != "none"]
    numbered = bool(named) and all(name.isdigit() for name in named)
    first = [cell.strip() for cell in rows[0]]
    if first == ["", *map(str, range(len(first) - 1))]:
        raise UsageError(
            f"{path}: its first row, {lines[0][:40]!r}, numbers the columns; write their names"
            " (of pandas: to_csv(index=False), with column names)"
        )
    has_names = any(bare(name) in known for name in first)
    if numbered and has_names:
        raise UsageError(
            f"{path}: its first row has names, {lines[0][:40]!r}; name the columns by them"
        )
    texts = not any(map(NUMBER.fullmatch, first)) and separator not in (" ", "::")
    header = not numbered if named else texts or has_names
    blanks = (" ",) if named else (" ", "\t")
    widths = {len(row) for line, row in zip(lines, rows) if line.count('"') % 2 == 0}
    ragged = in_lines and not has_names and len(widths) > 1 and max(widths) > 2
    if ragged and separator not in blanks:
        raise UsageError(
            f"{path}: rows of {min(widths)} to {max(widths)} cells: a user and items per line?"
            " split them at blanks or tabs, and name no columns"
        )
    if in_lines and (ragged or not header) and separator in blanks:
        sample = [dict(zip("12", _two_cells(line))) for line in lines]
        return Table(path, parts, "lines", " ", encoding, False, ["1", "2"], sample)
    columns = [str(i + 1) for i in range(len(first))]
    if header:
        _refuse_twice(path, [name for name in first if name])
        columns = _named(first)
    inside = [row for row in rows[header:] if len(row) == len(columns)]
    sample = [dict(zip(columns, (cell.strip() for cell in row))) for row in inside]
    return Table(path, parts, "text", separator, encoding, header, columns, sample)


def _separator(path: Path, lines: list[str]) -> str:
    """What splits the lines into equal numbers of cells, the first line too."""
    whole = [line for line in lines if line.count('"') % 2 == 0]
    by_separator = {s: [len(_split(line, s)) for line in whole] for s in SEPARATORS}
    for separator, counts in by_separator.items():
        if counts and min(counts) > 1 and counts[0] == max(set(counts), key=counts.count):
            return separator
    one_field = all(counts[:1] == [1] for s, counts in by_separator.items() if s != " ")
    for separator, counts in by_separator.items():
        titled = len(counts) > 2 and counts[0] == 1 and min(counts[1:]) > 1
        if titled and (separator != " " or one_field):  # blanks are in titles of items too
            raise UsageError(
                f"{path}: its first line, {lines[0][:40]!r}, has one field, the next ones"
                f" {counts[1]}: a title? remove it"
            )
    return next((s for s in SEPARATORS if s in lines[0]), ",")


def _split(line: str, separator: str) -> list[str]:
    if separator not in BY_LETTERS:
        return next(csv.reader([line], delimiter=separator), [""])
    cells = line.rstrip("\r\n").split(separator)
    if '"' not in line:
        return cells
    return [c[1:-1].replace('""', '"') if ENCLOSED.fullmatch(c) else c for c in cells]


def _named(header: list[str]) -> list[str]:
    return [name.strip() or f"unnamed ({i})" for i, name in enumerate(header, start=1)]


def _two_cells(line: str) -> list[str]:
    """The user and the rest of a line; a user without items has an empty rest."""
    return [*line.split(None, 1), "", ""][:2]


def _refuse_twice(path: Path, columns: list[str]) -> None:
    twice = [name for name in columns if columns.count(name) > 1]
    if twice:
        raise UsageError(f"{path}: column {twice[0]} appears {columns.count(twice[0])} times")


def _opened(path: Path) -> BinaryIO:
    """Open for reading; the first bytes decide the compression, not the name."""
    with open(path, "rb") as raw:
        start = raw.read(6)
    opener = next((opener for magic, opener in MAGIC.items() if start.startswith(magic)), open)
    return opener(path, "rb")


def _opened_text(table: Table, comments: bool = True) -> Iterator[str]:
    """The lines from the first row on; what is skipped before it is printed with `comments`."""
    text = io.TextIOWrapper(_opened(table.path), encoding=table.encoding, newline="")
    lines = (line.removeprefix("\ufeff") for line in text)  # of files that were joined
    return _from_first_row(lines, table.path if comments else None)


def _text(table: Table, columns: list[str]) -> Iterator[pd.DataFrame]:
    lines, path, number = _opened_text(table), table.path, 1
    reader = csv.reader(lines, delimiter=table.separator[0], strict=True)
    by_letters = table.separator in BY_LETTERS
    rows = (_split(line, table.separator) for line in lines) if by_letters else reader
    try:
        header = next(rows, table.columns) if table.header else None
        names = _named(header) if header else table.columns
        _refuse_twice(path, [name for name in names if name in columns])
        place = {name: i for i, name in enumerate(names)}
        number += table.header
        while chunk := [*itertools.islice(rows, BATCH)]:
            if header in chunk:
                again = number + chunk.index(header)
                raise UsageError(f"{path}: row {again} is the header again; remove that row")
            if {*map(len, chunk)} != {len(names)}:
                chunk = _of_width(path, chunk, number, len(names), by_letters)
            cells, numbers = [*zip(*chunk)], range(number, number + len(chunk))
            if cells:
                found = {name: cells[place[name]] for name in columns}
                yield pd.DataFrame(found, numbers, columns, dtype=object)
            number += len(chunk)
    except csv.Error as error:
        raise UsageError(
            f"{path}: the row that begins in line {_last_whole(table) + 1}, counted from the first"
            f" row: a quote is opened and not closed at its cell's end ({error}); double the quotes"
            " inside cells, or remove them"
        ) from None


def _last_whole(table: Table) -> int:
    """The line where the last row ends before one that cannot be read."""
    reader = csv.reader(_opened_text(table, False), delimiter=table.separator[0], strict=True)
    line = 0
    with contextlib.suppress(csv.Error):
        for _ in reader:
            line = reader.line_num
    return line


def _of_width(
    path: Path, rows: list[list[str]], number: int, n: int, by_letters: bool
) -> list[list[str]]:
    """The rows without blank lines, those of less than n cells filled up. Raises UsageError: one
    has more, or is the rest of a cell in quotes.

    Args:
        number: of the first row.
        by_letters: quotes were letters when lines were split.
    """
    rows, opened = [row for row in rows if len(row) > 1 or "".join(row).strip()], False
    for i, row in enumerate(rows, start=number):
        if len(row) < n and opened:
            raise UsageError(
                f"{path}: row {i - 1} opens a quote that the next line closes; between tabs a cell"
                " is one line: write CSV or parquet instead"
            )
        opened = by_letters and row[-1].startswith('"') and row[-1].count('"') % 2 == 1
        if len(row) > n:
            raise UsageError(
                f"{path}: row {i} has {len(row)} fields, expected {n}: is the separator in a field,"
                " as in 4,5? write CSV with such fields in quotes; or does the header lack a name?"
            )
        if len(row) == 1 and n > 2:  # of two columns the list may be empty
            raise UsageError(
                f"{path}: row {i} has one field, {row[0][:40]!r}, expected {n}: another separator,"
                " or a line that was cut?"
            )
        row += [""] * (n - len(row))
    return rows


def _lines(table: Table, columns: list[str]) -> Iterator[pd.DataFrame]:
    lines = enumerate(_opened_text(table), start=1)
    places = [int(name) - 1 for name in columns]
    cells = ((number, _two_cells(line)) for number, line in lines if line.strip())
    return _framed(((number, [pair[i] for i in places]) for number, pair in cells), columns)


def _json(table: Table, columns: list[str]) -> Iterator[pd.DataFrame]:
    def numbered() -> Iterator[tuple[int, list]]:
        for number, line in enumerate(_opened_text(table), start=1):
            row = _parsed(line)
            if row is not None:
                yield number, [_cell(row.get(name)) for name in columns]
            elif line.strip():
                raise UsageError(f"{table.path}: row {number}: not a JSON object ({line[:40]!r})")

    return _framed(numbered(), columns)


def _framed(rows: Iterator[tuple[int, list]], columns: list[str]) -> Iterator[pd.DataFrame]:
    """Frames of numbered rows, many at a time."""
    while chunk := [*itertools.islice(rows, BATCH)]:
        numbers, cells = zip(*chunk)
        yield pd.DataFrame(cells, numbers, columns, dtype=object)


def _parquet(table: Table, columns: list[str]) -> Iterator[pd.DataFrame]:
    row = 1
    file = pa.parquet.ParquetFile(table.path)
    for batch in file.iter_batches(batch_size=BATCH, columns=columns):
        options = {"integer_object_nulls": True, "ignore_metadata": True}
        frame = batch.to_pandas(**options)[columns]  # an index is a column like others
        for name in columns:
            if frame[name].dtype == object:
                values = (v.tolist() if hasattr(v, "tolist") else v for v in frame[name])
                frame[name] = pd.Series([*map(_cell, values)], frame.index, dtype=object)
        frame.index += row
        yield frame
        row += len(frame)
