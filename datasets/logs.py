"""Reading a file of unknown form as batches of columns: what it looks like, and its lines as Arrow.

LEAVE ALONE. `look` detects the format from the first lines; `batches` streams the requested
columns, as text if the file is text.
"""

import bz2
import csv
import gzip
import io
import itertools
import lzma
import re
import zlib
from collections.abc import Callable, Container, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import orjson
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet
from tqdm import tqdm

from engine.errors import UsageError
from engine.files import Watched

SAMPLE_BYTES, SAMPLE_LINES = 2**18, 50
BATCH = 2**17  # lines
LINE_BREAKS = 50  # in one cell
SAVE_AS_UTF8 = "save it as UTF-8 (iconv -f WINDOWS-1252 -t UTF-8)"
SEPARATORS = ("::", "\t", ";", ",", "|", " ")
MAGIC = {b"\x1f\x8b": gzip.open, b"\xfd7zXZ": lzma.open, b"BZh": bz2.open}
UTF16 = (b"\xff\xfe", b"\xfe\xff")
NUMBER = re.compile(r"-?\d+(\.\d*)?([eE][+-]?\d+)?")
DAMAGED = (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error)


class Form(NamedTuple):
    """What a file looks like.

    kind: table, lines ("user item item ..."), json or parquet.
    quoted: whether quotes mean something in a table.
    skip: lines of a table before its first row.
    columns: names; of a table without header the columns' numbers, from 1.
    sample: the first lines' cells, as text.
    """

    path: Path
    kind: str
    separator: str
    encoding: str
    header: bool
    columns: list[str]
    sample: list[list[str]]
    quoted: bool = True
    skip: int = 0

    @property
    def lists(self) -> bool:
        return self.kind == "lines"

    def shown(self) -> str:
        """The columns, for messages."""
        text = ", ".join(self.columns)
        return text if len(text) <= 120 else text[:117] + "..."

    def describe(self) -> str:
        words = {"\t": "tabs", " ": "spaces", ";": "semicolons", ",": "commas", "|": "bars"}
        if self.kind == "table":
            head = "with" if self.header else "without"
            separator = words.get(self.separator, self.separator)
            return f"a table, separated by {separator}, {head} a header"
        kinds = {"lines": "a user and their items per line", "json": "a JSON object per line"}
        return kinds.get(self.kind, "parquet")

    def where(self, column: str) -> str:
        """Which column it is, for the report."""
        if self.kind == "lines":
            return "the first word of a line" if column == "1" else "the other words"
        return f"column {column}" if self.header else f"column number {column}"


def look(
    path: Path, known: Container[str] = (), header: bool | None = None, lists: bool | None = None
) -> Form:
    """Tell a file's form from its first lines.

    Args:
        known: names that columns have; a line with one of them is a header.
        header: whether a table has one; None looks.
        lists: whether every line is a user and a list; None looks.
    Raises:
        UsageError: it is empty, damaged, or of a form that is not read here.
    """
    try:
        with open(path, "rb") as raw:
            start = raw.read(4)
        if start == b"PAR1":
            return _look_at_parquet(path)
        with _opened(path) as file:
            head = file.read(SAMPLE_BYTES)
    except DAMAGED as error:
        raise UsageError(f"{path}: damaged ({error})") from None
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror or error})") from None
    if head[:4] == b"PK\x03\x04":
        raise UsageError(f"{path}: looks like a zip or Excel file; save it as CSV")
    encoding = "utf-16" if head[:2] in UTF16 else "utf-8-sig"
    text = head.decode(encoding, "replace")
    lines = [line for line in text.splitlines() if line.strip()]
    if len(head) == SAMPLE_BYTES:
        lines = lines[:-1]  # cut off
    lines = lines[:SAMPLE_LINES]
    if not lines:
        raise UsageError(f"{path}: is empty")
    if lines[0].lstrip().startswith("{"):
        return _look_at_json(path, encoding, lines)
    if lines[0].lstrip().startswith("[") and not lines[0].rstrip().endswith("]"):
        raise UsageError(f"{path}: looks like one JSON array; write a JSON object per line")
    return _look_at_table(path, encoding, text, lines, known, header, lists)


def bare(name: str) -> str:
    """A column's name without RecBole's type and without case."""
    return name.split(":")[0].strip().lower().replace(" ", "_").replace("-", "_")


def _look_at_parquet(path: Path) -> Form:
    try:
        file = pa.parquet.ParquetFile(path)
        batch = next(file.iter_batches(batch_size=SAMPLE_LINES), None)
    except pa.ArrowException as error:
        raise UsageError(f"{path}: damaged parquet ({str(error)[:100]})") from None
    columns = file.schema_arrow.names
    twice = [name for name in columns if columns.count(name) > 1]
    if twice:
        raise UsageError(f"{path}: column {twice[0]} appears {columns.count(twice[0])} times")
    sample = [] if batch is None else list(zip(*(_text(column) for column in batch.columns)))
    cells = [[cell or "" for cell in row] for row in sample]
    return Form(path, "parquet", "", "", True, columns, cells)


def _text(column: pa.Array) -> list[str | None]:
    return [None if value is None else str(value) for value in column.to_pylist()]


def _look_at_json(path: Path, encoding: str, lines: list[str]) -> Form:
    columns: dict[str, None] = {}
    rows = []
    for line in lines:
        try:
            row = orjson.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            columns |= dict.fromkeys(row)
            rows.append(row)
    sample = [[_cell(row.get(name)) or "" for name in columns] for row in rows]
    return Form(path, "json", "", encoding, True, list(columns), sample)


def _cell(value: object) -> str | None:
    """A JSON value as text; a list or an object as JSON."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, float) and value.is_integer():
        return f"{value:.1f}"
    return orjson.dumps(value).decode() if isinstance(value, list | dict) else str(value)


def _look_at_table(
    path: Path,
    encoding: str,
    text: str,
    lines: list[str],
    known: Container[str],
    header: bool | None,
    lists: bool | None,
) -> Form:
    every = [s for s in SEPARATORS if all(s in line for line in lines)]
    in_first = [s for s in SEPARATORS if s in lines[0]]
    separator = next(iter(every), None) or next(iter(in_first), ",")
    words = {len(line.split()) for line in lines}
    if separator == " " and (lists if lists is not None else len(words) > 1):
        rows = [_two_cells(line) for line in lines]
        return Form(path, "lines", " ", encoding, False, ["1", "2"], rows)
    quoted = separator != "::" and (separator != "\t" or _quotes_close(lines))
    rows = _cells(text, separator, quoted)[: len(lines)]
    names = [cell.strip() for cell in rows[0]]
    if header is None:
        header = _is_header(rows, known)
    columns = [str(i + 1) for i in range(len(names))]
    if header:
        twice = [name for name in names if names.count(name) > 1 and bare(name) in known]
        if twice:
            raise UsageError(f"{path}: column {twice[0]} appears {names.count(twice[0])} times")
        columns = _unique_names(names)
    sample = [row for row in rows[header:] if len(row) == len(columns)]
    blank = len(text) - len(text.lstrip("\r\n\ufeff"))
    before = text[:blank].count("\n") + int(header)
    return Form(path, "table", separator, encoding, header, columns, sample, quoted, before)


def _is_header(rows: list[list[str]], known: Container[str]) -> bool:
    """Whether the first row has a common column name, or only texts that no later row repeats."""
    first = [cell.strip() for cell in rows[0]]
    if any(bare(name) in known for name in first):
        return True
    if any(not name or NUMBER.fullmatch(name) or name[0] in "[(" for name in first):
        return False
    later = [{row[i].strip() for row in rows[1:] if i < len(row)} for i in range(len(first))]
    return not any(name in column for name, column in zip(first, later))


def _unique_names(names: list[str]) -> list[str]:
    """Column names with empty and duplicate ones made unique."""
    apart: list[str] = []
    for number, name in enumerate(names, start=1):
        free = name and name not in apart
        apart.append(name if free else f"{name or 'unnamed'} ({number})")
    return apart


def _quotes_close(lines: list[str]) -> bool:
    """Whether cells between tabs are quoted: some begin with a quote, and those end with one."""
    cells = [cell for line in lines for cell in line.split("\t") if cell.startswith('"')]
    return bool(cells) and all(len(cell) > 1 and cell.endswith('"') for cell in cells)


def _cells(text: str, separator: str, quoted: bool) -> list[list[str]]:
    if separator == "::":
        return [line.split("::") for line in text.splitlines() if line.strip()]
    quoting = csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE
    reader = csv.reader(io.StringIO(text), delimiter=separator, quoting=quoting)
    try:
        return [row for row in itertools.islice(reader, 10 * SAMPLE_LINES) if row]
    except csv.Error:
        return [line.split(separator) for line in text.splitlines() if line.strip()]


def _opened(path: Path) -> BinaryIO:
    """Open for reading; the first bytes decide the compression, not the name."""
    return (_opener(path) or open)(path, "rb")


def _opener(path: Path) -> Callable[..., BinaryIO] | None:
    """What opens a compressed file; None for a plain one."""
    with open(path, "rb") as raw:
        start = raw.read(6)
    return next((opener for magic, opener in MAGIC.items() if start.startswith(magic)), None)


def batches(form: Form, columns: list[str]) -> Iterator[tuple[int, dict[str, pa.Array]]]:
    """(row of the first line, column name -> values) of the file; the first row is 1, a header's.

    Raises:
        UsageError: the file is damaged or a line has another number of fields.
    """
    readers = {"table": _table, "lines": _lines, "json": _json_lines, "parquet": _parquet}
    try:
        yield from readers[form.kind](form, list(dict.fromkeys(columns)))
    except DAMAGED as error:
        raise UsageError(f"{form.path}: damaged ({error})") from None
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{form.path}: not UTF-8 near byte {error.start}; {SAVE_AS_UTF8}"
        ) from None
    except pa.ArrowException as error:
        text = str(error).splitlines()[0]
        wrong = re.search(r"Row #(\d+): Expected (\d+) columns, got (\d+)", text)
        if wrong:
            row, expected, got = wrong.groups()
            text = f"row {row} has {got} fields, expected {expected}"
        elif "invalid UTF8" in text:
            text = f"not UTF-8; {SAVE_AS_UTF8}"
        raise UsageError(f"{form.path}: {text[:200]}") from None


def _bar(path: Path) -> tqdm:
    options = {"unit": "B", "unit_scale": True, "mininterval": 1.0, "dynamic_ncols": True}
    total = None if _opener(path) else path.stat().st_size
    return tqdm(total=total, desc=path.name, **options)


def _watched(file: BinaryIO, bar: tqdm) -> io.BufferedReader:
    """The file, with a bar over its uncompressed bytes."""
    return io.BufferedReader(Watched(file, lambda block: bar.update(len(block))), 2**20)


def _table(form: Form, columns: list[str]) -> Iterator[tuple[int, dict[str, pa.Array]]]:
    names = form.columns
    if form.separator == "::":  # pyarrow splits at one letter: there is an empty column between
        names = list(itertools.chain.from_iterable((name, f"{name} ") for name in names))[:-1]
    parse = pa.csv.ParseOptions(
        delimiter=form.separator[0],
        quote_char='"' if form.quoted else False,
        newlines_in_values=form.quoted,
    )
    encoding = "utf8" if form.encoding == "utf-8-sig" else "utf16"
    read = pa.csv.ReadOptions(
        column_names=names, skip_rows=form.skip, use_threads=False, encoding=encoding
    )
    convert = pa.csv.ConvertOptions(
        include_columns=columns,
        column_types=dict.fromkeys(columns, pa.string()),
        strings_can_be_null=False,
    )
    with _opened(form.path) as file, _bar(form.path) as bar:
        source = _watched(file, bar)
        row = 1 + form.skip
        for batch in pa.csv.open_csv(
            source, read_options=read, parse_options=parse, convert_options=convert
        ):
            arrays = {name: batch.column(name) for name in columns}
            _refuse_open_quotes(form.path, row, arrays)
            yield row, arrays
            row += batch.num_rows


def _refuse_open_quotes(path: Path, row: int, arrays: dict[str, pa.Array]) -> None:
    """A quote that is opened and not closed swallows the lines after it."""
    for name, array in arrays.items():
        breaks = pc.count_substring(array, "\n")
        most = pc.max(breaks).as_py() or 0
        if most > LINE_BREAKS:
            place = row + pc.index(breaks, most).as_py()
            raise UsageError(
                f"{path}: row {place}: {name} goes over {most + 1} lines; is a quote not closed?"
            )


def _text_lines(form: Form) -> Iterator[tuple[int, str]]:
    with _opened(form.path) as file, _bar(form.path) as bar:
        source = _watched(file, bar)
        yield from enumerate(io.TextIOWrapper(source, encoding=form.encoding), start=1)


def _two_cells(line: str) -> list[str]:
    """The user and the rest of a line; a user without items has an empty rest."""
    return [*line.split(None, 1), "", ""][:2]


def _lines(form: Form, columns: list[str]) -> Iterator[tuple[int, dict[str, pa.Array]]]:
    for lines in _chunks(_text_lines(form)):
        cells = list(zip(*(_two_cells(line) for _, line in lines)))
        yield lines[0][0], {name: pa.array(cells[int(name) - 1], pa.string()) for name in columns}


def _json_lines(form: Form, columns: list[str]) -> Iterator[tuple[int, dict[str, pa.Array]]]:
    for lines in _chunks(_text_lines(form)):
        values: dict[str, list[str | None]] = {name: [] for name in columns}
        for number, line in lines:
            try:
                row = orjson.loads(line)
            except ValueError:
                row = None
            if not isinstance(row, dict):
                raise UsageError(f"{form.path}: row {number}: not a JSON object ({line[:40]!r})")
            for name, column in values.items():
                column.append(_cell(row.get(name)))
        arrays = {name: pa.array(column, pa.string()) for name, column in values.items()}
        yield lines[0][0], arrays


def _chunks(lines: Iterator[tuple[int, str]]) -> Iterator[list[tuple[int, str]]]:
    """Lines that are not blank, many at a time; a blank line ends a chunk, so that rows count."""
    chunk: list[tuple[int, str]] = []
    for number, line in lines:
        if line.strip():
            chunk.append((number, line))
        if chunk and (len(chunk) == BATCH or not line.strip()):
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _parquet(form: Form, columns: list[str]) -> Iterator[tuple[int, dict[str, pa.Array]]]:
    file = pa.parquet.ParquetFile(form.path)
    row = 1
    with tqdm(total=file.metadata.num_rows, desc=form.path.name, unit="row", mininterval=1) as bar:
        for batch in file.iter_batches(batch_size=BATCH, columns=columns):
            yield row, {name: _as_read(batch.column(name)) for name in columns}
            row += batch.num_rows
            bar.update(batch.num_rows)


def _as_read(column: pa.Array) -> pa.Array:
    """A parquet column as a text file has it; times stay times, a list becomes JSON."""
    kind = column.type
    if pa.types.is_dictionary(kind):
        column = column.dictionary_decode()
    if pa.types.is_timestamp(kind):
        return column
    if pa.types.is_floating(kind):
        whole = pc.equal(pc.floor(column), column)
        if pc.all(whole).as_py():
            column = column.cast(pa.int64())
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        cells = [
            None if value is None else orjson.dumps(value).decode() for value in column.to_pylist()
        ]
        return pa.array(cells, pa.string())
    return column.cast(pa.string())


def numbers(values: pa.Array) -> np.ndarray:
    """float64 [n]; NaN where a value is no number."""
    try:
        return pc.cast(values, pa.float64()).fill_null(np.nan).to_numpy(zero_copy_only=False)
    except pa.ArrowInvalid:
        return pd.to_numeric(pd.Series(values.to_pylist()), errors="coerce").to_numpy(np.float64)


def are_dates(values: pa.Array) -> bool:
    """Whether times are dates rather than numbers; what comes first decides."""
    if pa.types.is_timestamp(values.type):
        return True
    return bool(len(values)) and bool(np.isnan(numbers(values[:1]))[0])


def times(values: pa.Array, dates: bool) -> tuple[np.ndarray, np.ndarray]:
    """Times that sort, whole where they can be, and a mask of the values that are none.

    Numbers stay as they are. Dates become microseconds.
    """
    if pa.types.is_timestamp(values.type):
        wrong = values.is_null().to_numpy(zero_copy_only=False)
        micro = values.cast(pa.timestamp("us", values.type.tz), safe=False).cast(pa.int64())
        return micro.fill_null(0).to_numpy(), wrong
    if dates:
        found = pd.Series(values.to_pylist())
        found = pd.to_datetime(found, format="ISO8601", utc=True, errors="coerce")
        micro = found.to_numpy("datetime64[us]")
        return micro.astype(np.int64), np.isnat(micro)
    try:
        whole = pc.cast(values, pa.int64())
        return whole.fill_null(0).to_numpy(), whole.is_null().to_numpy(zero_copy_only=False)
    except pa.ArrowInvalid:
        pass
    found = numbers(values)
    wrong = ~np.isfinite(found)
    found = np.where(wrong, 0, found)
    whole = found.astype(np.int64)
    return (whole if (whole == found).all() else found), wrong


def unit(form: Form, column: str) -> str:
    """What a time column's numbers seem to be, for the report."""
    place = form.columns.index(column)
    cells = [row[place].strip() for row in form.sample if row[place].strip()]
    if not cells or not all(NUMBER.fullmatch(cell) for cell in cells):
        return " (dates)"
    largest = max(abs(float(cell)) for cell in cells)
    for least, name in ((1e17, "nanoseconds"), (1e14, "microseconds"), (1e11, "milliseconds")):
        if largest >= least:
            return f" ({name})"
    return " (seconds)" if largest >= 1e8 else " (numbers)"
