"""A table in a file or a folder of parts, as a stream of frames: text, parquet, JSON lines."""

import bz2
import csv
import gzip
import io
import itertools
import lzma
import re
import warnings
import zlib
from collections.abc import Callable, Container, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import orjson
import pandas as pd
import pyarrow as pa
import pyarrow.parquet
from tqdm import tqdm

from datasets.cells import parsed
from engine.errors import UsageError, one_line

SAMPLE_BYTES, SAMPLE_ROWS = 2**18, 50
BATCH = 2**17  # rows of a frame
SEPARATORS = ("::", "\t", ";", ",", "|", " ")
MAGIC = {b"\x1f\x8b": gzip.open, b"\xfd7zXZ": lzma.open, b"BZh": bz2.open}
UTF16 = (b"\xff\xfe", b"\xfe\xff")
COMMENT = re.compile(r"#|sep=.$")  # the second is Excel's
NUMBER = re.compile(r"-?\d+(\.\d*)?([eE][+-]?\d+)?|\d{4}-\d\d-\d\d.*")
DAMAGED = (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error, pa.ArrowException)
UNREAD = {  # what a file starts with -> what it is, and what to do
    b"PK\x03\x04": "a zip or Excel file; save it as CSV",
    b"\x28\xb5\x2f\xfd": "zstd; unpack it first (zstd -d)",
    b"SQLite format 3": "an SQLite database; export the table as CSV",
}
SAVE_AS_UTF8 = "save it as UTF-8 (iconv -f WINDOWS-1252 -t UTF-8)"


csv.field_size_limit(2**31 - 1)  # a cell may hold an image


def bare(name: str) -> str:
    """A column's name without RecBole's type and without case."""
    return name.split(":")[0].strip().lower()


class Table(NamedTuple):
    """What a file looks like.

    kind: text, lines ("user item item ..."), json or parquet. parts: the files that are read.
    columns: names; without a header their numbers from 1. sample: the first rows, as text by
        column. quoted: whether quotes enclose cells of text. lenient: a line that is no JSON object
        is a row of None, and cells stay as they are. skip: lines before the first row of the part
        that is read; `frames` finds it.
    """

    path: Path
    parts: list[Path]
    kind: str
    separator: str
    encoding: str
    header: bool
    columns: list[str]
    sample: list[dict[str, str]]
    quoted: bool = True
    lenient: bool = False
    skip: int = 0

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
        return f"split at {self.separator!r}, {'with' if self.header else 'without'} a header"

    def frames(self, columns: list[str]) -> Iterator[pd.DataFrame]:
        """The columns of the file, many rows at a time; the index has their rows in the file, from
        1, which is a header's. Raises UsageError: the file is damaged or a row has another number
        of fields.
        """
        readers = {"text": _text, "lines": _lines, "json": _json, "parquet": _parquet}
        options = {"unit": "row", "unit_scale": True, "mininterval": 1.0, "dynamic_ncols": True}
        for part, skip in self._starts():
            table = self._replace(path=part, skip=skip)
            frames = readers[self.kind](table, list(dict.fromkeys(columns)))
            try:
                with tqdm(desc=part.name, **options) as bar:
                    for frame in frames:
                        yield frame
                        bar.update(len(frame))
            except DAMAGED as error:
                raise UsageError(f"{part}: damaged ({str(error)[:100]})") from None
            except UnicodeError:
                raise UsageError(f"{part}: not UTF-8; {SAVE_AS_UTF8}") from None
            except (pd.errors.ParserError, csv.Error) as error:
                wrong = re.search(r"Expected (\d+) fields in line (\d+), saw (\d+)", str(error))
                text = one_line(error, 120)
                if wrong:
                    expected, row, found = wrong.groups()
                    text = f"row {row} has {found} fields, expected {expected}"
                elif "EOF inside string" in text:
                    text = f"a quote is opened and not closed ({text})"
                raise UsageError(f"{part}: {text}") from None
            except pd.errors.ParserWarning:
                raise UsageError(
                    f"{part}: rows have more fields than the {len(self.columns)} of the header:"
                    " is the separator in a field, as in 4,5? quote such fields"
                ) from None
            except KeyError as error:
                raise UsageError(f"{part}: lacks the column {error}") from None

    def _starts(self) -> Iterator[tuple[Path, int]]:
        """The parts, and how many lines come before each one's first row; one header for all."""
        if self.kind not in ("text", "lines"):
            yield from ((part, 0) for part in self.parts)
            return
        first = None
        for part in self.parts:
            with _opened(part) as file:
                _, skipped, lines = _look(file.read(SAMPLE_BYTES))
            for comment in filter(str.strip, skipped):
                print(f"{part}: skipped the comment {comment[:60]!r}")
            header = _split(lines[0], self.separator) if self.header and lines else None
            first = first or header
            if header not in (None, first):
                raise UsageError(
                    f"{part}: starts with {','.join(header)[:60]!r}, {self.parts[0]} with"
                    f" {','.join(first)[:60]!r}; give every part the same header, or join them"
                    " in one file"
                )
            yield part, len(skipped)


class Names:
    """Codes of names, in the order in which they come; -1 for a missing one.

    Args:
        clean: what makes a name of a cell, "" where it is missing.
    """

    def __init__(self, clean: Callable[[object], str]) -> None:
        self.codes: dict[str, int] = {}
        self.clean = clean

    def encode(self, cells: pd.Series) -> np.ndarray:
        """int32 [n], a code per cell."""
        coded, distinct = pd.factorize(cells.astype(object), use_na_sentinel=False)
        names, codes = map(self.clean, distinct), self.codes
        own = [codes.setdefault(name, len(codes)) if name else -1 for name in names]
        return np.array(own, dtype=np.int32)[coded]

    def in_order(self, column: np.ndarray, by_value: bool = False) -> tuple[list[str], np.ndarray]:
        """The names in order, and a column of codes with new ones that are in this order.

        Args:
            by_value: whole numbers by their value, where all names are such.
        """
        numbers = by_value and all(re.fullmatch(r"-?[0-9]{1,4000}", name) for name in self.codes)
        key = (lambda name: (int(name), name)) if numbers else None
        names = sorted(self.codes, key=key)
        new = np.empty(len(names), dtype=np.int32)
        new[[self.codes[name] for name in names]] = np.arange(len(names), dtype=np.int32)
        return names, new[column]


def open_table(
    path: Path,
    named: Sequence[str] = (),
    known: Container[str] = (),
    lines: bool = False,
    lenient: bool = False,
) -> Table:
    """Tell a file's form from its first rows.

    Args:
        known: names of which one makes the first row a header.
        named: columns that the user names; whole numbers mean that there is no header.
        lines: whether text without a header is "user item item ...".
        lenient: the file has JSON lines, some of which may be broken.
    Raises:
        UsageError: it is empty, damaged, or of a form that is not read here.
    """
    parts = [path]
    if path.is_dir():
        parts = sorted((p for p in path.iterdir() if p.name[0] not in "._"), key=_by_number)
        parts = [part for part in parts if not part.is_file() or part.stat().st_size]
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
            head = file.read(SAMPLE_BYTES)
    except DAMAGED as error:
        raise UsageError(f"{first}: damaged ({str(error)[:100]})") from None
    except OSError as error:
        raise UsageError(f"{first}: cannot be read ({error.strerror or error})") from None
    for magic, what in UNREAD.items():
        if head.startswith(magic):
            raise UsageError(f"{first}: looks like {what}")
    encoding, _, every = _look(head)
    every = every[:-1] if len(head) == SAMPLE_BYTES and every[1:] else every  # cut off
    rows = [*filter(str.strip, every)]
    if not rows:
        raise UsageError(f"{first}: is empty")
    if lenient or rows[0].lstrip().startswith("{"):
        return _look_at_json(path, parts, encoding, rows, lenient)
    if rows[0].lstrip().startswith("[") and not rows[0].lstrip().startswith("[["):
        raise UsageError(f"{first}: looks like one JSON array; write a JSON object per line")
    return _look_at_text(path, parts, encoding, rows, named, known, lines)


def _by_number(part: Path) -> list:
    """A key for names in which day-2 comes before day-10."""
    return [int(text) if text.isdecimal() else text for text in re.split(r"(\d+)", part.name)]


def _look(head: bytes) -> tuple[str, list[str], list[str]]:
    """The encoding of a text, the blank lines and comments before its first row, the rest."""
    encoding = "utf-16" if head[:2] in UTF16 else "utf-8-sig"
    text = io.StringIO(head.decode(encoding, "replace"), newline=None)  # ends lines as readers do
    lines, skip = [line.rstrip("\n") for line in text], 0
    while skip < len(lines) and (not lines[skip].strip() or COMMENT.match(lines[skip])):
        skip += 1
    return encoding, lines[:skip], lines[skip:]


def _look_at_parquet(path: Path, parts: list[Path]) -> Table:
    file = pa.parquet.ParquetFile(parts[0])
    batch = next(file.iter_batches(batch_size=SAMPLE_ROWS), None)
    columns = file.schema_arrow.names
    _refuse_twice(parts[0], columns)
    rows = [] if batch is None else batch.to_pylist()
    return Table(path, parts, "parquet", "", "", True, columns, [*map(_texts, rows)])


def _look_at_json(
    path: Path, parts: list[Path], encoding: str, lines: list[str], lenient: bool
) -> Table:
    rows = [row for row in map(_parsed, lines) if row is not None]
    if not rows and not lenient:
        raise UsageError(
            f"{path}: its first line is {lines[0][:40]!r}; write a JSON object per line"
        )
    columns = list(dict.fromkeys(name for row in rows for name in row))
    sample = [*map(_texts, rows[:SAMPLE_ROWS])]
    return Table(path, parts, "json", "", encoding, True, columns, sample, lenient=lenient)


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
        return value.decode("utf-8", "backslashreplace")  # different bytes stay different
    if isinstance(value, list | dict):
        return orjson.dumps(value, default=_text_of).decode()
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
    # between tabs a quote may be a letter: it encloses a cell where every one that is opened ends
    opened = _opened_quotes(lines) or _opened_quotes(every)
    quoted = separator != "\t" or (bool(opened) and all(c.rstrip().endswith('"') for c in opened))
    quoted = quoted and separator != "::"
    rows = [_split(line, separator, quoted) for line in lines]
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
    if in_lines and not header and separator in blanks:
        sample = [dict(zip("12", _two_cells(line))) for line in lines]
        return Table(path, parts, "lines", " ", encoding, False, ["1", "2"], sample)
    columns = [str(i + 1) for i in range(len(first))]
    if header:
        _refuse_twice(path, [name for name in first if name])
        columns = [name or f"unnamed ({i})" for i, name in enumerate(first, start=1)]
    inside = [row for row in rows[header:] if len(row) == len(columns)]
    sample = [dict(zip(columns, (cell.strip() for cell in row))) for row in inside]
    return Table(path, parts, "text", separator, encoding, header, columns, sample, quoted)


def _opened_quotes(lines: list[str]) -> list[str]:
    return [cell for line in lines for cell in line.split("\t") if cell.startswith('"')]


def _separator(path: Path, lines: list[str]) -> str:
    """What splits the lines into equal numbers of cells, the first line too."""
    whole = [line for line in lines if line.count('"') % 2 == 0]
    by_separator = {s: [len(_split(line, s)) for line in whole] for s in SEPARATORS}
    for separator, counts in by_separator.items():
        if counts and min(counts) > 1 and counts[0] == max(set(counts), key=counts.count):
            return separator
    for counts in by_separator.values():
        if len(counts) > 2 and counts[0] == 1 and min(counts[1:]) > 1:
            raise UsageError(
                f"{path}: its first line, {lines[0][:40]!r}, has one field, the next ones"
                f" {counts[1]}: a title? remove it"
            )
    return next((s for s in SEPARATORS if s in lines[0]), ",")


def _split(line: str, separator: str, quoted: bool = True) -> list[str]:
    if separator == "::" or not quoted:
        return line.split(separator)
    return next(csv.reader([line], delimiter=separator), [""])


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


class _Counted(io.TextIOWrapper):
    """A text that counts the line ends that were read."""

    line_ends = 0

    def read(self, size: int | None = -1) -> str:
        text = super().read(size)
        self.line_ends += text.count("\n")
        return text


def _opened_text(table: Table) -> _Counted:
    """The text from its first row on."""
    errors = "replace" if table.lenient else "strict"
    text = _Counted(_opened(table.path), encoding=table.encoding, errors=errors, newline="")
    for _ in range(table.skip):
        text.readline()
    return text


def _text(table: Table, columns: list[str]) -> Iterator[pd.DataFrame]:
    text = _opened_text(table)
    source: Any = text
    separator = table.separator
    if separator == "::":  # the fast reader splits at one letter
        source, separator = io.StringIO(text.read().replace("::", "\x1f")), "\x1f"
    options = {"dtype": str, "keep_default_na": False, "chunksize": BATCH, "index_col": False}
    options |= {"sep": separator, "quoting": csv.QUOTE_MINIMAL if table.quoted else csv.QUOTE_NONE}
    names, n_rows = table.columns, 0
    head = 0 if table.header else None
    reader = pd.read_csv(source, header=head, names=names, **options)
    while True:
        with warnings.catch_warnings():  # where every row is longer pandas cuts them, and warns
            warnings.simplefilter("error", pd.errors.ParserWarning)
            frame = next(reader, None)
        if frame is None:
            break
        frame.index += 1 + table.header
        n_rows += len(frame)
        if not table.quoted and separator == "\t":
            _refuse_late_quotes(table, frame[columns])
        yield frame[columns]
    if table.quoted and text.line_ends > n_rows + table.header:  # cells hold line ends
        _refuse_open_quotes(table)


def _refuse_late_quotes(table: Table, frame: pd.DataFrame) -> None:
    """Refuse a cell with doubled quotes inside quotes where the first rows have letters of them."""
    for name in frame:
        cells = frame[name][frame[name].str.startswith('"')]
        late = cells[cells.str.fullmatch(r'"([^"]|"")*""([^"]|"")*"')]
        if len(late):
            raise UsageError(
                f"{table.path}: row {late.index[0]}: {late.iloc[0][:40]!r} is a cell in quotes,"
                " which are letters in the rows before; write CSV or parquet instead"
            )


def _refuse_open_quotes(table: Table) -> None:
    """Refuse a quote that is closed inside a cell: pandas takes all rows until then as one."""
    with _opened_text(table) as text:
        reader = csv.reader(text, delimiter=table.separator, strict=True)
        try:
            for _ in reader:
                pass
        except csv.Error:
            raise UsageError(
                f"{table.path}: line {table.skip + reader.line_num}: a quote that an earlier cell"
                " opens is closed inside a cell; double the quotes inside cells, or remove them"
            ) from None


def _lines(table: Table, columns: list[str]) -> Iterator[pd.DataFrame]:
    for numbers, lines in _chunks(_opened_text(table), table.skip + 1):
        cells = [_two_cells(line) for line in lines]
        yield pd.DataFrame(cells, numbers, ["1", "2"])[columns]


def _json(table: Table, columns: list[str]) -> Iterator[pd.DataFrame]:
    for numbers, lines in _chunks(_opened_text(table)):
        rows = []
        for number, line in zip(numbers, lines):
            row = _parsed(line)
            if row is None and not table.lenient:
                raise UsageError(f"{table.path}: row {number}: not a JSON object ({line[:40]!r})")
            cells = [(row or {}).get(name) for name in columns]
            rows.append(cells if table.lenient else [*map(_cell, cells)])
        yield pd.DataFrame(rows, numbers, columns, dtype=object)


def _chunks(
    text: io.TextIOBase, start: int = 1
) -> Iterator[tuple[tuple[int, ...], tuple[str, ...]]]:
    """Lines that are not blank and their numbers, many at a time."""
    lines = ((number, line) for number, line in enumerate(text, start) if line.strip())
    while chunk := [*itertools.islice(lines, BATCH)]:
        numbers, texts = zip(*chunk)
        yield numbers, texts


def _parquet(table: Table, columns: list[str]) -> Iterator[pd.DataFrame]:
    row = 1
    file = pa.parquet.ParquetFile(table.path)
    for batch in file.iter_batches(batch_size=BATCH, columns=columns):
        options = {"integer_object_nulls": True, "ignore_metadata": True}
        frame = batch.to_pandas(**options)[columns]  # an index is a column like others
        for name in columns:
            if frame[name].dtype == object:
                values = (v.tolist() if hasattr(v, "tolist") else v for v in frame[name])
                frame[name] = [*map(_cell, values)]
        frame.index += row
        yield frame
        row += len(frame)
