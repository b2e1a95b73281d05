"""Strict flags over python-fire's syntax: a wrong request is answered before any work is done.

python-fire calls the function first and complains about an unknown flag afterwards, guesses types from the value
(`--flag=false` arrives as a true string) and lets stray words fill arguments. Here the typed keyword-only signature
of `main` is the contract: names, types, choices and ranges are bound against it, every problem is reported in one
line with exit status 2, and only then does `main` run. Fire writes the help page.
"""

import difflib
import functools
import inspect
import json
import math
import os
import re
import sys
import time
import types
import typing
from collections.abc import Callable
from typing import Annotated, Any, Literal, NamedTuple

from utils import distributed


class UsageError(Exception):
    """The request is wrong (flag, file, folder): one line for the user, exit status 2, whatever is quoted in it."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.splitlines()))


class RunError(Exception):
    """The run failed (non-finite loss, disk full, ...): one line for the user, exit status 1."""


class Stopped(Exception):
    """A signal ended the run in good order: its number, and a line for the user; exit status 128 + number."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.number = number


class Range(NamedTuple):
    """Bounds of a number; an open bound excludes itself."""

    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False

    def admits(self, value: float) -> bool:
        above = value > self.low if self.open_low else value >= self.low
        below = value < self.high if self.open_high else value <= self.high
        return above and below and -math.inf < value < math.inf

    def __str__(self) -> str:
        low = "" if self.low == -math.inf else f"{'>' if self.open_low else '>='} {self.low:g}"
        high = "" if self.high in (math.inf, LARGEST) else f"{'<' if self.open_high else '<='} {self.high:g}"
        return " and ".join(part for part in (low, high) if part) or "finite"


class PositiveOr(NamedTuple):
    """A whole number from 1, or one that stands for something else."""

    other: int
    meaning: str

    def admits(self, value: int) -> bool:
        return 1 <= value <= LARGEST or value == self.other

    def __str__(self) -> str:
        return f">= 1, or {self.other} for {self.meaning}"


class WordOrNumbers(NamedTuple):
    """One of some words, or whole numbers such as 0,2,4,6."""

    words: tuple[str, ...]

    def admits(self, value: str) -> bool:
        numbers = r"[0-9]+( *, *[0-9]+)*"
        return value in self.words or re.fullmatch(rf"{numbers}|\[{numbers}\]", value) is not None

    def __str__(self) -> str:
        return f"one of {', '.join(self.words)}, or numbers such as 0,2,4,6"


FIRST_SPEAKS = 30  # seconds that the other processes leave it
LARGEST = 2**31 - 1  # of whole numbers that count something
PositiveInt = Annotated[int, Range(low=1, high=LARGEST)]
NonNegativeInt = Annotated[int, Range(low=0, high=LARGEST)]
Seed = Annotated[int, Range(low=0, high=2**63 - 1)]
MaxSteps = Annotated[int, PositiveOr(-1, "num_epochs")]  # -1 as in the released scripts
Interval = Annotated[int, PositiveOr(-1, "every epoch")]
PositiveFloat = Annotated[float, Range(low=0, open_low=True)]
NonNegativeFloat = Annotated[float, Range(low=0)]
DropRate = Annotated[float, Range(low=0, high=1, open_high=True)]
LAYER_WORDS = ("first", "interval", "last", "influence")
LayerSelection = Annotated[str, WordOrNumbers(LAYER_WORDS)]

BOOLEANS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def command(main: Callable) -> Callable:
    """Check names, types, choices and ranges of `main`'s keyword arguments at every call, also in process.

    Raises:
        UsageError: naming every argument that does not fit the signature, in one line.
    """
    hints = typing.get_type_hints(main, include_extras=True)

    @functools.wraps(main)
    def checked(**values: Any) -> Any:
        problems = [_unknown(name, hints) for name in values if name not in hints]
        problems += [
            f"--{name} is required" for name, default in defaults(main).items() if default is inspect.Parameter.empty and name not in values
        ]
        for name, value in values.items():
            if name in hints:
                try:
                    _check(name, value, hints[name])
                except UsageError as problem:
                    problems.append(str(problem))
        _raise_all(problems)
        return main(**values)

    return checked


def check(*rules: tuple[bool, str]) -> None:
    """Raise one UsageError with the message of every rule whose condition is false."""
    _raise_all([message for holds, message in rules if not holds])


def run(main: Callable, argv: list[str] | None = None) -> None:
    """Bind the command line to `main`'s signature, run it, and turn expected errors into one line and a status."""
    argv = sys.argv[1:] if argv is None else argv
    if not distributed.is_first():  # one process talks
        os.environ["TQDM_DISABLE"] = "1"
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  until the end
    if any(word in ("-h", "--help") for word in argv):
        import fire

        fire.Fire(_described(main), command=["--help"], name=os.path.basename(sys.argv[0]))
        return
    try:
        main(**bind(main, argv))
    except UsageError as error:
        if distributed.is_first():
            _exit(2, f"error: {error}")
        time.sleep(FIRST_SPEAKS)  # the first meets the same; torchrun ends the rest when one ends, and would have silenced it
        _exit(2, f"error: {_who()}{error}")
    except RunError as error:
        _exit(1, f"error: {_who()}{error}")
    except Stopped as stop:
        _exit(128 + stop.number, f"stopped: {stop}" if distributed.is_first() else "")
    except (MemoryError, RuntimeError) as error:
        if not _out_of_memory(error):
            raise
        reason = str(error).splitlines()[0][:160] if str(error) else "MemoryError"
        _exit(1, f"error: {_who()}out of memory ({reason}); lower --micro_batch_size (or --batch_size), --eval_batch_size or --max_seq_length")
    except KeyboardInterrupt:
        _exit(130, "interrupted")
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:  # a full disk, a folder that went away
        _exit(1, f"error: {error.strerror or error}" + (f": {error.filename}" if error.filename else ""))
    if distributed.world() > 1:
        _exit(0, "")


def bind(main: Callable, argv: list[str]) -> dict[str, Any]:
    """Parse `--name=value`, `--name value`, `--name` and `--noname` (booleans) by the annotations of `main`.

    Returns:
        The values given, by parameter name; parameters not given are absent.
    Raises:
        UsageError: with every problem of the command line, in one line.
    """
    hints = {name: hint for name, hint in typing.get_type_hints(main, include_extras=True).items() if name != "return"}
    values: dict[str, Any] = {}
    problems: list[str] = []
    words = list(argv)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            problems.append(f"unexpected word {word!r}: flags are written --name=value")
            continue
        name, equals, text = word[2:].partition("=")
        name = name.replace("-", "_")
        if name not in hints and not equals and name.startswith("no") and _is_bool(hints.get(name[2:])):
            name, equals, text = name[2:], "=", "false"
        if name not in hints:
            problems.append(_unknown(name, hints))
            if not equals and words and not _is_flag(words[0]):
                words.pop(0)
            continue
        if not equals:
            if words and not _is_flag(words[0]) and not (_is_bool(hints[name]) and words[0] not in BOOLEANS):
                text = words.pop(0)
            elif _is_bool(hints[name]):
                text = "true"
            else:
                problems.append(f"--{name} needs a value, expected {_describe(hints[name])}")
                continue
        if name in values:
            problems.append(f"--{name} is given twice")
        try:
            values[name] = _convert(name, text, hints[name])
        except UsageError as problem:
            problems.append(str(problem))
    _raise_all(problems)
    return values


def _described(main: Callable) -> Callable:
    """A stand-in of `main` for fire's help page: the words of `_describe` for types, a text for every flag.

    The docstring's lines `a, b: text` under "Args:" stand for each of the flags a and b.
    """
    summary, _, lines = inspect.getdoc(main).partition("Args:\n")
    texts: dict[str, str] = {}
    names: list[str] = []
    for line in lines.splitlines():
        head, colon, text = line.strip().partition(": ")
        if colon and all(name in defaults(main) for name in head.split(", ")):
            names = head.split(", ")
            texts |= dict.fromkeys(names, text)
        else:
            texts |= {name: f"{texts[name]} {line.strip()}" for name in names}
    hints = typing.get_type_hints(main, include_extras=True)
    flags = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=type(_describe(hints[name]), (), {}))
        for name, default in defaults(main).items()
    ]

    def page(**_: Any) -> None: ...

    page.__signature__ = inspect.Signature(flags)
    page.__doc__ = summary + "Args:\n" + "\n".join(f"    {name}: {text}" for name, text in texts.items())
    return page


def _raise_all(problems: list[str]) -> None:
    if problems:
        raise UsageError("; ".join(problems))


def _exit(status: int, line: str) -> None:
    if line:
        print(line, file=sys.stderr, flush=True)
    if distributed.world() > 1:
        # gloo's thread lets go of the last exchange after the main thread has its result; when it meets an interpreter that is
        # closing, it aborts the process ("terminate called without an active exception") after all work is done
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def _who() -> str:
    return f"process {distributed.rank()}: " if distributed.world() > 1 else ""


def _out_of_memory(error: Exception) -> bool:
    """Python's, CUDA's (torch.OutOfMemoryError) and the CPU allocator's, which is a plain RuntimeError."""
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)


def _unknown(name: str, hints: dict[str, Any]) -> str:
    near = difflib.get_close_matches(name, hints, n=1, cutoff=0.5)
    return f"unknown flag --{name}" + (f" (did you mean --{near[0]}?)" if near else " (--help lists the flags)")


def _options(hint: Any) -> list[Any]:
    """The members of `X | None`, or the hint alone."""
    return list(typing.get_args(hint)) if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union else [hint]


def _plain(hint: Any) -> tuple[Any, Range | PositiveOr | WordOrNumbers | None]:
    """The type that is not None, and its limits if the annotation carries any."""
    (hint,) = [option for option in _options(hint) if option is not type(None)]
    if typing.get_origin(hint) is Annotated:
        kind, limits = typing.get_args(hint)
        return kind, limits
    return hint, None


def _is_flag(word: str) -> bool:
    """Whether a word is `--name` or `--name=...`; flags for another script in quotes, with a space in them, are a value."""
    return word.startswith("--") and not re.match(r"--[\w-]+\s", word)


def _is_bool(hint: Any) -> bool:
    return hint is not None and _plain(hint)[0] is bool


def _describe(hint: Any) -> str:
    kind, limits = _plain(hint)
    if typing.get_origin(kind) is Literal:
        return "one of " + ", ".join(map(str, typing.get_args(kind)))
    if typing.get_origin(kind) is list:
        return "a list such as a,b or [a,b]"
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[kind]
    if isinstance(limits, WordOrNumbers):
        return str(limits)
    return f"{words} {limits}" if limits else words


def _convert(name: str, text: str, hint: Any) -> Any:
    kind, _ = _plain(hint)
    wrong = UsageError(f"--{name}={text}: expected {_describe(hint)}")
    if text.lower() in ("none", "null") and type(None) in _options(hint):
        return None
    if kind is bool:
        if text.lower() not in BOOLEANS:
            raise wrong
        return BOOLEANS[text.lower()]
    if typing.get_origin(kind) is list:
        (element,) = typing.get_args(kind)
        value = [_convert(name, item, element) for item in _split(text)]
    else:
        value = text
    if kind in (int, float):
        try:
            value = kind(text)
        except ValueError:
            raise wrong from None
        if "_" in text:
            raise wrong
    _check(name, value, hint, text)
    return value


def _split(text: str) -> list[str]:
    """The items of `a,b`, `[a,b]`, `["a", "b"]` or a single `a`."""
    try:
        parsed = json.loads(text)
    except ValueError:
        parsed = None
    if isinstance(parsed, list):
        return [str(item) for item in parsed]
    return [item.strip().strip("'\"") for item in text.strip().strip("[]()").split(",") if item.strip()]


def _check(name: str, value: Any, hint: Any, typed: str | None = None) -> None:
    kind, limits = _plain(hint)
    wrong = UsageError(f"--{name}={value if typed is None else typed}: expected {_describe(hint)}")
    if value is None and type(None) in _options(hint):
        return
    if typing.get_origin(kind) is Literal:
        if value not in typing.get_args(kind):
            raise wrong
    elif typing.get_origin(kind) is list:
        if not isinstance(value, list) or not value:
            raise wrong
    elif kind is float:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise wrong
    elif type(value) is not kind:
        raise wrong
    if limits is not None and not limits.admits(value):
        raise wrong


def blocks(distill_block: int, **layers: int) -> tuple[bool, str]:
    """The rule, for `check`, that the number of blocks divides a number of layers, given by its flag's name."""
    ((name, n),) = layers.items()
    divisors = ", ".join(str(d) for d in range(1, n + 1) if n % d == 0)
    return (
        n % distill_block == 0,
        f"--distill_block={distill_block} does not divide {name} {n} ({n} % {distill_block} = {n % distill_block}); use one of {divisors}",
    )


def divides(*, micro_batch_size: int | None, batch_size: int) -> tuple[bool, str]:
    """The rule, for `check`, that whole micro-batches of every process fill a batch."""
    processes = distributed.world()
    shown = f"{processes} processes" if processes > 1 else ""
    if micro_batch_size:
        shown += f"{' x ' if shown else ''}--micro_batch_size={micro_batch_size}"
    return batch_size % ((micro_batch_size or 1) * processes) == 0, f"--batch_size={batch_size} is not a multiple of {shown}"


def defaults(main: Callable) -> dict[str, Any]:
    """The default of every flag of `main`."""
    return {name: parameter.default for name, parameter in inspect.signature(main).parameters.items()}
