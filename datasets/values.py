"""Times and ratings of a log: numbers or dates, and whether they can be what they seem."""

import re
from pathlib import Path

import numpy as np
import pandas as pd

from engine import cli
from engine.errors import UsageError, one_line

YEAR = re.compile(r"%[YyGFDcxs]")  # in a form of times
ZONE = r"(?:[zZ]|[+-]\d\d:?\d\d|:\d\d(?:\.\d+)?\s*[+-]\d\d)\s*$"
EPOCH, APART = 1e8, 100  # times this large count seconds or less; of one unit they are this near
GAP, SINCE = 10, 9e8  # times of two units are so far apart, and the larger ones seconds of 1998 on
UNKNOWN_TIMES = (0, -1, 2**31 - 1)  # where the others are dates
UNDATED = "no times are read; name their column"


def judge_form(form: str, timed: bool) -> None:
    """Refuse a form of times that cannot sort, or where none are read."""
    given, hours = f"--time_format={form}", {*re.findall("%.", form)}
    cli.check(
        (timed or not form, f"{given}: {UNDATED}"),
        ("%" in form or not form, f"{given}: expected a form such as %d.%m.%Y %H:%M"),
        ("%" not in form or YEAR.search(form), f"{given}: without a year times do not sort"),
        (not {"%H", "%p"} <= hours, f"{given}: %p needs %I, not %H"),
    )


def are_dates(cells: pd.Series, form: str | None) -> bool:
    """Whether times are dates rather than numbers; what comes first decides."""
    if form or pd.api.types.is_datetime64_any_dtype(cells):
        return True
    return bool(pd.to_numeric(cells[:1], errors="coerce").isna().all())


def times_of(
    path: Path,
    cells: pd.Series,
    rows: np.ndarray,
    dates: bool,
    form: str | None,
    zones: list[bool],
    mend: str,
) -> np.ndarray:
    """Times that sort: numbers as they are, dates in seconds since 1970.

    Args:
        form: of the dates; ISO 8601 by default.
        mend: what to do about dates of another form.
        zones: see `_judge_zones`.
    """
    texts = are_texts(cells)
    if not dates:
        numbers = numbers_of(path, cells, rows, "time")
        refuse_rounded(path, cells, rows, "time")
        refuse(path, np.abs(numbers) >= 2**63, cells, rows, "time", "fewer digits, at most 2^63")
        if texts:
            refuse(
                path, _are_cut(cells), cells, rows, "time", "all its digits: a spreadsheet cut them"
            )
        whole = pd.to_numeric(cells, errors="coerce")
        return whole.to_numpy() if whole.dtype == np.int64 else numbers
    expected = f"a number or a date such as 2024-04-25 08:00:00; {mend}"
    expected = f"a time of the form {form}" if form else expected
    if texts:  # not "now"
        without = ~cells.astype(str).str.contains(r"\d").to_numpy()
        refuse(path, without, cells, rows, "time", expected)
    if texts and not form and str(cells.iloc[0]).endswith(" UTC"):  # BigQuery's; .0 is left out
        cells = cells.astype(str).str.replace(r" UTC$", "Z", regex=True)
    if not form:
        _judge_zones(path, cells, rows, zones)
    try:
        found = pd.to_datetime(cells, format=form or "ISO8601", utc=True, errors="coerce")
    except ValueError as error:  # not a form of time
        raise UsageError(f"--time_format={form}: {one_line(error)}") from None
    refuse(path, found.isna().to_numpy(), cells, rows, "time", expected)
    return found.to_numpy("datetime64[us]").astype(np.int64) / 1e6


def _are_cut(cells: pd.Series) -> np.ndarray:
    """Mask of the numbers that have fewer digits than their exponent says, bool [n]."""
    texts = cells.astype(str)
    if not texts.str.contains("e", case=False, regex=False).any():
        return np.zeros(len(texts), dtype=bool)
    parts = texts.str.extract(r"^-?\d[.,]?(\d*)[eE]\+?(\d+)$")
    return (parts[0].str.len() < pd.to_numeric(parts[1])).to_numpy()


def _judge_zones(path: Path, cells: pd.Series, rows: np.ndarray, seen: list[bool]) -> None:
    """Refuse times with a zone beside times without one, in this frame or before."""
    zoned = cells.astype(str).str.contains(ZONE)
    if pd.api.types.is_datetime64_any_dtype(cells):
        zoned[:] = cells.dt.tz is not None
    if not seen:
        seen.append(bool(zoned.iloc[0]))
    other, expected = (zoned != seen[0]).to_numpy(), "a time zone in every row or in none"
    refuse(path, other, cells, rows, "time", expected)


def judge_times(path: Path, time: np.ndarray, rows: np.ndarray, dates: bool) -> None:
    """Refuse times that do not sort, and 0, -1, 1970 or a cut number among dates."""
    if not dates:
        _judge_numbers(path, time, rows)
    unknown = np.isin(time, UNKNOWN_TIMES)
    if not dates and np.median(time) >= EPOCH:
        unknown |= time < EPOCH
    others = time[~unknown] if not unknown.all() else time
    if unknown.any() and np.median(others) >= EPOCH:
        first = int(unknown.argmax())
        raise UsageError(
            f"{path}: row {rows[first]}: the time is {time[first]:.0f}, the others are dates"
            f" ({unknown.sum():,} such rows): missing, or cut? remove these rows, or mend their"
            " times"
        )


def _judge_numbers(path: Path, time: np.ndarray, rows: np.ndarray) -> None:
    """Refuse two units or forms in one column, a clock without a date, days before years."""
    lengths = set((np.log10(np.maximum(np.abs(time), 1)).astype(np.int64) + 1).tolist())
    if 8 in lengths and lengths & {12, 14} and lengths <= {8, 12, 14}:
        raise UsageError(f"{path}: times of 8 and of more digits: days and minutes in one column?")
    first, last = time // 100, time % 100
    in_year = (first >= 1) & (first <= 12) & (last >= 1) & (last <= 31)  # MMDD, which sorts
    clock = time.max() < 2400 and (last < 60).all() and not in_year.all()
    if clock and len(np.unique(time)) > 60:
        raise UsageError(
            f"{path}: times from {time.min():.0f} to {time.max():.0f} look like a clock (HHMM)"
            " without a date; join the date and the time in one column"
        )
    early, late = time[(time > 0) & (time < EPOCH)], time[time >= EPOCH]
    ends = None
    if len(late) and late.max() / late.min() > APART:
        ends = late.min(), late.max()
    elif len(early) and len(late) and np.median(time) < EPOCH:  # most are not dates
        apart = late.min() / early.max() > GAP and late.min() > SINCE
        ends = (early.max(), late.min()) if apart else None
    if ends is not None:
        small, large = (rows[(time == t).argmax()] for t in ends)
        units = "seconds and milliseconds" if ends[0] >= EPOCH else "two units"
        raise UsageError(
            f"{path}: times in rows {small} and {large} are a factor of {ends[1] / ends[0]:,.0f}"
            f" apart: {units} in one column?"
        )
    if not (lengths <= {7, 8} or lengths <= {5, 6}):
        return
    century = 100 if lengths <= {5, 6} else 10_000
    last, second, first = time % century, time // century % 100, time // (100 * century)
    pair = np.stack([first, second])
    backwards = (pair.min(0) >= 1) & (pair.max(0) <= 31) & (pair.min(0) <= 12)
    if century == 100:  # 280524 and 052824: days vary more than years
        sorts = ((second >= 1) & (second <= 12) & (last >= 1) & (last <= 31)).all()
        varied = first if sorts else time // century
        backwards &= len(np.unique(varied)) > len(np.unique(last))
    else:
        backwards &= (last >= 1990) & (last <= 2100)
    if backwards.all():
        raise UsageError(
            f"{path}: times such as {time[0]:.0f} look like days before years and do not sort;"
            " write 2024-04-25 or 20240425"
        )


def shown_time(time: float, dates: bool) -> str:
    if dates:
        return str(np.datetime64(int(time), "s")).replace("T", " ")
    return str(time) if isinstance(time, np.integer) else f"{time:.15g}"


def numbers_of(path: Path, cells: pd.Series, rows: np.ndarray, role: str) -> np.ndarray:
    numbers = pd.to_numeric(cells, errors="coerce").to_numpy(np.float64)
    refuse(path, ~np.isfinite(numbers), cells, rows, role, "a number, with a decimal point")
    return numbers


def refuse_rounded(path: Path, cells: pd.Series, rows: np.ndarray, role: str) -> None:
    """Refuse ids and times that a column of floats rounded to fewer digits than they had."""
    if isinstance(cells.dtype, np.dtype) and cells.dtype.kind == "f":
        wrong = (cells.abs() >= 2 ** (np.finfo(cells.dtype).nmant + 1)).to_numpy()
        expected = f"all its digits: {cells.dtype} cut them"
        refuse(path, wrong, cells, rows, role, expected)


def are_texts(cells: pd.Series) -> bool:
    return cells.dtype == object or pd.api.types.is_string_dtype(cells)


def refuse(
    path: Path, wrong: np.ndarray, cells: pd.Series, rows: np.ndarray, role: str, expected: str
) -> None:
    if wrong.any():
        first = int(wrong.argmax())
        shown = str(cells.iloc[first])[:40]
        raise UsageError(f"{path}: row {rows[first]}: the {role} is {shown!r}, expected {expected}")
