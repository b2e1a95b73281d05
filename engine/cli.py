"""The command line: typed flags in groups, python-fire's syntax, all checked before any work.

python-fire calls the function first and complains about an unknown flag afterwards, guesses types
from the value (`--flag=false` arrives as a true string) and lets stray words fill arguments. Here
the signature of `main` is the contract: its flag groups and its own flags. Names, types, choices
and limits are checked, every problem is reported in one line with exit status 2, and only then does
`main` run. Fire writes the help page.
"""

import contextlib
import dataclasses
import difflib
import functools
import inspect
import io
import json
import math
import os
import re
import sys
import types
import typing
from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from engine import processes
from engine.errors import UsageError
from engine.files import read_json

BOOLEANS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
REQUIRED = dataclasses.MISSING  # the default of a flag that must be given


class Limits(NamedTuple):
    """What values a flag admits, and that in words."""

    words: str
    admits: Callable[[Any], bool]


def pattern(regex: str, words: str) -> Limits:
    """A text of a certain form."""
    return Limits(words, lambda text: re.fullmatch(regex, text) is not None)


def positive_or(other: int, meaning: str) -> Limits:
    """A whole number from 1, or one value with another meaning."""
    words = f">= 1, or {other} for {meaning}"
    return Limits(words, lambda number: 1 <= number <= LARGEST or number == other)


LARGEST = 2**31 - 1  # of whole numbers that count something
PositiveInt = Annotated[int, Limits(">= 1", lambda n: 1 <= n <= LARGEST)]
NonNegativeInt = Annotated[int, Limits(">= 0", lambda n: 0 <= n <= LARGEST)]
Seed = Annotated[int, Limits(">= 0 and below 2^63", lambda n: 0 <= n < 2**63)]
PositiveFloat = Annotated[float, Limits("> 0", lambda x: 0 < x < math.inf)]
NonNegativeFloat = Annotated[float, Limits(">= 0", lambda x: 0 <= x < math.inf)]
DropRate = Annotated[float, Limits(">= 0 and < 1", lambda x: 0 <= x < 1)]


def flag(default: Any = REQUIRED, help: str = "", needs: str = "", **about: Any) -> Any:
    """A flag of a group, or of a script's own.

    Args:
        default: the value without the flag; left out, the flag is required. A list is copied.
        help: one or two lines for `--help`.
        needs: the flag without which this one has no effect: `name` (set, and not 0), `name=value`,
            or `*mark` for all flags with that mark; several are separated by bars.
        about: what else is kept beside the flag. `replaces` names flags of a --config that this one
            stands in for.
    """
    metadata = {"help": help, "needs": needs} | about
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: [*default], metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@typing.dataclass_transform(kw_only_default=True, frozen_default=True)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Group:
    """Flags of one kind, each a field; a subclass is a frozen dataclass, and names its kind once:
    `class Data(Group, kind="files")`.

    Attributes:
        kind: files (where they are), model and training (the same when a run resumes), or free.
        usual: flags whose empty value adapts, and what it is where nothing speaks against it.
        stream: what the group adds to the seed of a run's draws.
        given: the names that the user wrote.
    """

    kind: ClassVar[str] = ""
    usual: ClassVar[dict[str, int]] = {}
    stream: ClassVar[int] = 0
    given: frozenset[str] = dataclasses.field(default=frozenset(), repr=False, compare=False)

    def __init_subclass__(cls, kind: str = "") -> None:
        cls.kind = kind or cls.kind
        dataclasses.dataclass(frozen=True, kw_only=True)(cls)

    @classmethod
    def fields(cls) -> list[dataclasses.Field]:
        return [field for field in dataclasses.fields(cls) if field.name != "given"]

    def values(self) -> dict[str, Any]:
        """Flag name -> value."""
        return {field.name: getattr(self, field.name) for field in self.fields()}

    def problems(self, flags: dict[str, Any]) -> list[str]:
        """What is wrong between these flags and others, a line each.

        Args:
            flags: the value of every flag of the script, by name.
        """
        return []


class Flag(NamedTuple):
    """A flag of one script.

    kind: its type, without None. limits: of its values. optional: whether None is a value, which it
        is only where it is the default. about: help, needs and marks, see `flag`. parameter: the
        one of `main` that holds it. group: its group with the script's defaults; None for a flag of
        the script's own.
    """

    kind: Any
    limits: Limits | None
    optional: bool
    default: Any
    about: Mapping[str, Any]
    parameter: str
    group: Group | None

    @classmethod
    def of(cls, hint: Any, default: Any, *rest: Any) -> "Flag":
        """From its annotation."""
        union = typing.get_origin(hint) in (types.UnionType, typing.Union)
        options = typing.get_args(hint) if union else (hint,)
        (kind,) = (option for option in options if option is not type(None))
        limited = typing.get_origin(kind) is Annotated
        kind, limits = typing.get_args(kind) if limited else (kind, None)
        return cls(kind, limits, union and default in (None, REQUIRED), default, *rest)

    def describe(self) -> str:
        """What its value has to be, in words."""
        if typing.get_origin(self.kind) is Literal:
            return "one of " + ", ".join(map(str, typing.get_args(self.kind)))
        if typing.get_origin(self.kind) is list:
            return "a list such as a,b or [a,b]"
        if self.kind is str:
            return self.limits.words if self.limits else "text"
        words = {int: "a whole number", float: "a number", bool: "true or false"}[self.kind]
        return f"{words} {self.limits.words}" if self.limits else words


A_FILE = Annotated[str, Limits("the config.json of a run", bool)]
CONFIG = Flag.of(A_FILE, "", flag().metadata, "", None)


@functools.cache
def flags_of(main: Callable) -> dict[str, Flag]:
    """Name -> Flag of every flag of `main`, group after group."""
    found: dict[str, Flag] = {}
    hints = typing.get_type_hints(main, include_extras=True)
    for name, parameter in inspect.signature(main).parameters.items():
        absent = parameter.default is inspect.Parameter.empty
        hint, default = hints[name], REQUIRED if absent else parameter.default
        if isinstance(hint, type) and issubclass(hint, Group):
            instance = hint() if absent else default
            types_of = typing.get_type_hints(hint, include_extras=True)
            for field in hint.fields():
                default = getattr(instance, field.name)
                given = types_of[field.name], default, field.metadata, name, instance
                found[field.name] = Flag.of(*given)
        else:
            field = default if isinstance(default, dataclasses.Field) else flag(default)
            listed = field.default_factory is not dataclasses.MISSING
            default = field.default_factory() if listed else field.default
            found[name] = Flag.of(hint, default, field.metadata, name, None)
    return found


def defaults(main: Callable) -> dict[str, Any]:
    """The default of every flag of `main`."""
    return {name: flag.default for name, flag in flags_of(main).items()}


def command(main: Callable) -> Callable:
    """Let `main` be called with flags by name, all checked, and give it its groups. Raises
    UsageError: naming every flag that does not fit the signature, in one line.
    """

    @functools.wraps(main)
    def checked(**values: Any) -> Any:
        flags = flags_of(main)
        problems = [_unknown(name, flags) for name in values if name not in flags]
        for name, flag in flags.items():
            if name in values:
                problems.append(_problem(name, values[name], flag))
            elif flag.default is REQUIRED:
                problems.append(f"--{name} is required")
        _raise_all(problems)
        values = {name: _expanded(value) for name, value in values.items()}
        arguments = _arguments(main, values)
        every = {name: flag.default for name, flag in flags.items()} | values
        groups = [argument for argument in arguments.values() if isinstance(argument, Group)]
        _raise_all([line for group in groups for line in group.problems(every)])
        if not values.get("eval_only"):
            _report_unused(flags, values, every)
        return main(**arguments)

    return checked


def _arguments(main: Callable, values: dict[str, Any]) -> dict[str, Any]:
    """What `main` itself takes: its groups, and its own flags."""
    arguments: dict[str, Any] = {}
    flags = flags_of(main)
    for name, flag in flags.items():
        if flag.group is None:
            arguments[name] = values.get(name, flag.default)
        elif flag.parameter not in arguments:
            mine = {n: v for n, v in values.items() if flags[n].parameter == flag.parameter}
            group = dataclasses.replace(flag.group, **mine, given=frozenset(mine))
            arguments[flag.parameter] = group
    return arguments


def _report_unused(flags: dict[str, Flag], given: dict[str, Any], every: dict[str, Any]) -> None:
    """Print the given flags that have no effect because of another one."""
    lines = []
    for name, shown in given.items():
        needs = []
        for need in filter(None, flags[name].about["needs"].split("|")):
            mark = need.removeprefix("*")
            marked = [n for n, flag in flags.items() if flag.about.get(mark)]
            needs += [n.partition("=")[::2] for n in (marked if need != mark else [need])]
        needs = [(n, value) for n, value in needs if n in every]
        met = [str(every[n]) == value if value else every[n] for n, value in needs]
        if needs and not any(met):
            above = {n: " above 0" * (flags[n].kind in (int, float)) for n, _ in needs}
            ways = [f"--{n}={value}" if value else f"--{n}{above[n]}" for n, value in needs]
            lines.append(f"--{name}={shown} (needs {' or '.join(ways)})")
    if lines:
        print(f"without effect: {', '.join(lines)}")


def _expanded(value: Any) -> Any:
    """Expand a leading ~ to the home folder in each comma-separated part of a string."""
    if not isinstance(value, str):
        return value
    return ",".join(os.path.expanduser(part) for part in value.split(","))


def check(*rules: tuple[bool, str]) -> None:
    """Raise one UsageError with the message of every rule whose condition is false."""
    _raise_all([message for holds, message in rules if not holds])


def run(main: Callable, argv: list[str] | None = None) -> None:
    """Bind the command line to `main`, run it, and end the process (engine.processes.call)."""
    argv = sys.argv[1:] if argv is None else argv
    # titles that the terminal cannot show are escaped; a pipe gets every line at once
    sys.stdout.reconfigure(errors="backslashreplace", line_buffering=True)
    processes.quiet_all_but_first()
    helps = {"-h", "--help"} & set(argv)
    processes.call(lambda: print(_help_page(main)) if helps else main(**bind(main, argv)))


def bind(main: Callable, argv: list[str]) -> dict[str, Any]:
    """Parse `--name=value`, `--name value`, `--name` and `--noname` (booleans) by the flags of
    `main`. `--config RUN/config.json` gives the flags of that run; others come before them.

    Returns:
        The values given, by flag name. Flags that are not given are absent.
    Raises:
        UsageError: with every problem of the command line, in one line.
    """
    flags = flags_of(main) | {"config": CONFIG}
    values: dict[str, Any] = {}
    problems: list[str] = []
    switch = ""  # the boolean flag just read, written without "="
    words = list(argv)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            after = f" after --{switch}, which takes true or false" if switch else ""
            problems.append(f"unexpected word {word!r}{after}: flags are written --name=value")
            continue
        switch = ""
        name, text = _split_word(word, flags)
        if name not in flags:
            problems.append(_unknown(name, flags))
            if text is None and words and not _is_flag(words[0]):
                words.pop(0)
            continue
        flag = flags[name]
        if text is None:
            switch = name if flag.kind is bool else ""
            text = _next_value(words, bool(switch))
        if text is None:
            problems.append(f"--{name} needs a value, expected {flag.describe()}")
            continue
        if name in values:
            problems.append(f"--{name} is given twice")
        values[name] = _convert(text, flag)
        problems.append(_problem(name, values[name], flag, text))
    _raise_all(problems)
    config = values.pop("config", None)
    recorded = _recorded(config, flags_of(main)) if config else {}
    replaced: list[str] = []
    for name, value in values.items():
        if value != recorded.get(name, flags[name].default):
            replaced += flags[name].about.get("replaces", "").split("|")
    return {n: value for n, value in recorded.items() if n not in replaced} | values


def _recorded(path: str, flags: dict[str, Flag]) -> dict[str, Any]:
    """The flags of a run's config.json that differ from the defaults, without its folder."""
    path = os.path.join(path, "config.json") if os.path.isdir(path) else path
    recorded = read_json(path, "--config").get("flags")
    if not isinstance(recorded, dict):
        raise UsageError(f"--config={path}: records no flags; name a run's config.json")
    foreign = [name for name in recorded if name not in flags]
    if foreign:
        raise UsageError(
            f"--config={path}: of another command, or of other code: here is no --{foreign[0]}"
        )
    own = {"output_dir", "eval_only", "overwrite"}
    return {n: v for n, v in recorded.items() if n not in own and v != flags[n].default}


def _split_word(word: str, flags: dict[str, Flag]) -> tuple[str, str | None]:
    """Name and value of `--name=value`, `--name` (value None) or `--noname` (value "false")."""
    name, equals, text = word[2:].partition("=")
    name = name.replace("-", "_")
    negated = flags.get(name.removeprefix("no"))
    if name not in flags and not equals and negated is not None and negated.kind is bool:
        return name.removeprefix("no"), "false"
    return name, text if equals else None


def _next_value(words: list[str], is_switch: bool) -> str | None:
    """The value of a flag without `=`: the next word, taken from `words`, or true for a boolean."""
    follows = bool(words) and not _is_flag(words[0])
    if follows and (not is_switch or words[0].lower() in BOOLEANS):
        return words.pop(0)
    return "true" if is_switch else None


def _help_page(main: Callable) -> str:
    """Fire's, without the short flags that it makes up and with types in full."""
    import fire

    fire.helptext.LINE_LENGTH = 10_000
    page = io.StringIO()
    with contextlib.redirect_stderr(page), contextlib.suppress(SystemExit):
        fire.Fire(_described(main), command=["--help"], name=os.path.basename(sys.argv[0]))
    _, _, text = page.getvalue().partition("\n\n")  # after a line that fire logs
    return re.sub(r"^( +)-\w, --", r"\1--", text.rstrip(), flags=re.MULTILINE)


def _described(main: Callable) -> Callable:
    """A stand-in of `main` for fire's help page: its flags, and the groups by name."""
    summary = inspect.getdoc(main) or ""
    flags = flags_of(main)
    parameters = []
    groups: dict[str, list[str]] = {}
    for name, flag in flags.items():
        default = inspect.Parameter.empty if flag.default is REQUIRED else flag.default
        about = {"default": default, "annotation": type(flag.describe(), (), {})}
        parameters.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, **about))
        title = flag.group.__doc__ if flag.group else "Flags"
        groups.setdefault(title, []).append(f"--{name}")
    groups["Repeat a run"] = ["--config RUN/config.json"]
    listing = "\n".join(f"{title}: {' '.join(names)}" for title, names in groups.items())
    texts = "\n".join(f"    {name}: {flag.about['help']}" for name, flag in flags.items())

    def page(**_: Any) -> None: ...

    page.__signature__ = inspect.Signature(parameters)
    page.__doc__ = f"{summary}\n\n{listing}\n\nArgs:\n{texts}"
    return page


def _raise_all(problems: list[str]) -> None:
    problems = [problem for problem in problems if problem]
    if problems:
        raise UsageError("; ".join(problems))


def _unknown(name: str, flags: dict[str, Flag]) -> str:
    near = difflib.get_close_matches(name, flags, n=1, cutoff=0.6)
    listed = "(--help lists the flags, docs/differences.md maps the released ones)"
    hint = f"(did you mean --{near[0]}?)" if near else listed
    return f"unknown flag --{name} {hint}"


def _is_flag(word: str) -> bool:
    """Whether a word is `--name` or `--name=...`; a quoted text of flags has a space."""
    return word.startswith("--") and not re.match(r"--[\w-]+\s", word)


def _convert(text: str, flag: Flag) -> Any:
    """The value that a word means; the word itself where it means none."""
    words = ("None",) if flag.kind is str else ("None", "none", "null")  # a text may be "none"
    if flag.optional and text in words:
        return None
    if flag.kind is bool:
        return BOOLEANS.get(text.lower(), text)
    if typing.get_origin(flag.kind) is list:
        return _split(text)
    if flag.kind in (int, float) and "_" not in text:
        with contextlib.suppress(ValueError):
            return flag.kind(text)
    return text


def _split(text: str) -> list[str]:
    """The items of `a,b`, `[a,b]`, `["a", "b"]` or a single `a`."""
    try:
        parsed = json.loads(text)
    except ValueError:
        parsed = None
    if isinstance(parsed, list):
        return [str(item) for item in parsed]
    text = text.strip()
    if text[:1] + text[-1:] in ("[]", "()"):  # not those of a title's own
        text = text[1:-1]
    items = [item.strip() for item in text.split(",") if item.strip()]
    pairs = [len(item) > 1 and item[0] == item[-1] and item[0] in "'\"" for item in items]
    return [item[1:-1] if pair else item for item, pair in zip(items, pairs)]


def _problem(name: str, value: Any, flag: Flag, typed: str | None = None) -> str:
    """Why a flag cannot have this value; empty where it can."""
    if value is None and flag.optional:
        return ""
    kind, of = flag.kind, typing.get_origin(flag.kind)
    if of is Literal:
        fits = value in typing.get_args(kind)
    elif of is list:
        fits = isinstance(value, list) and bool(value) and all(value)
    elif kind is float:
        fits = isinstance(value, (int, float)) and not isinstance(value, bool)
    else:
        fits = type(value) is kind and value != ""  # an unset variable of the shell
    if fits and (flag.limits is None or flag.limits.admits(value)):
        return ""
    return f"--{name}={value if typed is None else typed}: expected {flag.describe()}"
