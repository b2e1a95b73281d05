"""The finished runs below a folder, and which of them are one row of a table.

Runs that are kept for good stand in an archive, `<name>.zip`, which is read like a folder of that
name.
"""

import io
import json
import math
import zipfile
import zlib
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

import distill
import finetune
import train_sr_trad
from datasets.domain import LEAVE_ONE_OUT, split_of
from engine import cli
from engine.errors import UsageError
from engine.files import read_json, replacing
from engine.run import Run, recorded_flags
from experiments.paper import label, plain_ce
from models.builtin import BUILT_IN
from utils.flags import Training

SCRIPTS = {"sasrec": train_sr_trad.main, "teacher": finetune.main, "student": distill.main}
KEPT = ("config.json", "results.json", "metrics.jsonl")
# flags that make no other row, beside files and free ones
COMMON = ("seed", "domain_type", "bf16")
GONE = {"loss": "full", "num_negatives": 256}  # of LLM steps of before 2026-11-26, without effect
NEEDED = {"test", "valid", "users", "parameters", "trainable_parameters"}
READ = ("teacher", "sasrec", "init")  # other runs, whose hashes config.json has
TABLE = ("sampled", "full", "full_all")
LONG_AGO = (1980, 1, 1, 0, 0, 0)  # in archives, so that equal runs give equal bytes


class FinishedRun(NamedTuple):
    """One finished run: its folder, the folder's name below the root, config.json, results.json."""

    folder: Path
    name: str
    config: dict[str, Any]
    results: dict[str, Any]

    @property
    def seed(self) -> int:
        return self.results["seed"]

    @property
    def stage(self) -> str:
        return self.config["step"]

    @property
    def domain(self) -> str:
        """Its name; another split and other candidates stand beside it."""
        drawn = self.flags["num_candidates"], self.flags["candidate_seed"]
        said = [f"split {self.flags['split']}"] * self.by_time
        said += ["candidates {}, seed {}".format(*drawn)] * (drawn != (999, 42))
        return self.config["domain"] + f" ({', '.join(said)})" * bool(said)

    @property
    def by_time(self) -> bool:
        """Whether its test targets are split off by time."""
        return split_of(self.flags) != LEAVE_ONE_OUT

    @property
    def as_published(self) -> bool:
        """Whether its figures may stand beside the paper's: leave-one-out, 1 + 999 candidates."""
        return not self.by_time and self.flags["num_candidates"] == 999

    @property
    def flags(self) -> dict[str, Any]:
        """As recorded. A flag added after the run has its default, one that is gone is left out."""
        known = cli.defaults(SCRIPTS[self.stage])
        recorded = recorded_flags(self.config, Training.usual)
        flags = known | {name: value for name, value in recorded.items() if name in known}
        return flags | {"train_targets": flags["train_targets"] or "last"}  # of before 2026-11-28

    @property
    def foreign(self) -> dict[str, Any]:
        """Flags that this code does not know, such as the weight of a term on another branch."""
        known, recorded = cli.defaults(SCRIPTS[self.stage]), self.config["flags"]
        return {n: v for n, v in recorded.items() if n not in known and v and GONE.get(n) != v}

    @property
    def settings(self) -> list[str]:
        """The counted flags that differ from their defaults, or where they are inherited from those
        of the earlier stage; and flags of other code.
        """
        own = cli.defaults(SCRIPTS[self.stage])
        every = [*map(cli.defaults, SCRIPTS.values()), own]
        usual = {name: v for defaults in every for name, v in defaults.items() if v is not None}
        usual["train_targets"] = own["train_targets"] or "last"
        flags, counted = self.flags, self.counted
        other = {n: flags[n] for n in flags if n in counted and flags[n] != usual.get(n)}
        return [f"{name}={value}" for name, value in (other | self.foreign).items()]

    @property
    def items_from(self) -> str | None:
        """What the item vectors were made from, where it is not SASRec from its own draws."""
        if self.stage == "sasrec":
            return "a table at the start" if self.flags.get("init_table") else None
        made_from, flags = self.config.get("items_from"), self.config.get("items_flags")
        if made_from == "SASRec" and flags:
            made_from = label("sasrec", cli.defaults(SCRIPTS["sasrec"]) | flags)
        return None if made_from == "SASRec" else made_from

    @property
    def n_sasrecs(self) -> int:
        """How many SASRecs taught it."""
        return sum(map(bool, self.read_by("sasrec")))

    @property
    def start(self) -> tuple[bool, str | None]:
        """Whether another run's weights are its start; the hash of a table that is the same for all
        seeds, from titles or of one's own: SASRec's start, or an LLM's items.
        """
        foreign = self.config.get("init_table_sha256")
        if self.config.get("items_from", "of before it was recorded") in (None, "titles"):
            foreign = foreign or self.config.get("table_sha256")
        return bool(self.flags.get("init_from")), foreign

    @property
    def label(self) -> str:
        started = ", started from another run" * self.start[0]
        items = f", items from {self.items_from}" if self.items_from else ""
        teachers = f", of {self.n_sasrecs} SASRecs" if self.n_sasrecs > 1 else ""
        foreign = "".join(f", {name}={value} of other code" for name, value in self.foreign.items())
        return label(self.stage, self.flags) + teachers + started + items + foreign

    @property
    def counted(self) -> set[str]:
        """The flags that make another row."""
        known = cli.flags_of(SCRIPTS[self.stage])
        free = {name for name, flag in known.items() if flag.group.kind in ("files", "free")}
        return set(self.flags) - free - set(COMMON)

    @property
    def key(self) -> str:
        """What the run is, whatever its seed and place.

        A student trained by cross-entropy alone is what finetune.py trains.
        """
        stage, flags, names = self.stage, self.flags, self.counted
        if stage != "sasrec" and plain_ce(flags):
            stage = "llm"
            names &= set(cli.defaults(SCRIPTS["teacher"])) & set(cli.defaults(SCRIPTS["student"]))
            names -= {"distill_block", "cls_multiple_lambda", "block_reduction", "exit_norm"}
        layers = self.config.get("model", {}).get("layers")
        values = {name: flags[name] for name in sorted(names)}
        table_of = cli.defaults(SCRIPTS["sasrec"]) | (self.config.get("items_flags") or {})
        made_by = self.items_from, self.n_sasrecs, table_of, self.config.get("items_made_by")
        made_by += (*self.start, self.foreign)
        if flags.get("base_model") not in (None, *BUILT_IN):  # which may be another one there
            made_by += (self.config.get("base_sha256"),)
        return json.dumps([stage, layers, bool(self.config.get("bf16")), values, *made_by])

    def ranks(self, protocol: str) -> np.ndarray | None:
        """Test ranks of all users [U], 1 the best; None where they are missing or torn."""
        try:
            with np.load(self.folder / "ranks.npz", allow_pickle=False) as ranks:
                return ranks[f"test_{protocol}"].astype(np.float64)
        except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, zlib.error):
            return None

    def read_by(self, entry: str) -> list[str]:
        """Hashes of the weights that the run read as its teacher, SASRec or start, which `entry` of
        config.json names.
        """
        return (self.config.get(f"{entry}_sha256") or "").split(",")

    def taught_by(self, teacher: "FinishedRun") -> bool:
        """By the weights' hash."""
        theirs = teacher.results.get("weights_sha256")
        return teacher.stage == "teacher" and theirs in self.read_by("teacher")


class Row(NamedTuple):
    """Runs that differ in their seed alone, by seed. base: the end of the label where it is another
    one than that of most rows.
    """

    label: str
    runs: dict[int, FinishedRun]
    base: str = ""

    @property
    def first(self) -> FinishedRun:
        return next(iter(self.runs.values()))


def read_runs(root: Path, unpacked: Path | None = None) -> tuple[list[FinishedRun], list[str]]:
    """Every finished run below `root`, teachers before students, and a note on each skipped one.

    Args:
        unpacked: an empty folder for what archives below `root` hold; None leaves them out.
    """
    found, notes = _read_folder(root)
    if unpacked is not None:
        for archive in sorted(root.glob("*.zip")):
            try:
                with zipfile.ZipFile(archive) as file:
                    file.extractall(unpacked / archive.stem)
            except (zipfile.BadZipFile, zlib.error) as error:
                notes.append(f"{archive.name}: damaged ({error})")
        more, more_notes = _read_folder(unpacked)
        found, notes = more + found, notes + more_notes  # of equal runs the last counts
    return sorted(found, key=lambda run: [*SCRIPTS].index(run.stage)), notes


def _read_folder(root: Path) -> tuple[list[FinishedRun], list[str]]:
    found, notes = [], []
    for path in sorted(root.rglob("config.json")):
        folder = path.parent
        inside = folder.relative_to(root)
        if any(part.startswith(".") for part in inside.parts):  # what a run replaces, for a while
            continue
        name = inside.as_posix() if inside.parts else root.resolve().name
        try:
            config = read_json(path, "run")
            if config.get("step") not in list(SCRIPTS):
                continue
            if not Run(config["step"], folder, config).finished:
                notes.append(f"{name} is unfinished")
                continue
            run = FinishedRun(folder, name, config, read_json(folder / "results.json", "results"))
            _check(run)
        except UsageError as problem:
            notes.append(f"{name}: {problem}")
        except (KeyError, TypeError, AttributeError):
            notes.append(f"{name}: its config.json or results.json lacks something")
        else:
            found.append(run)
    return found, notes


def _check(run: FinishedRun) -> None:
    """Raise KeyError, TypeError or AttributeError where the report would miss something."""
    splits = run.results["valid"], run.results["test"]
    read = [value for split in splits for name in TABLE for value in split[name].values()]
    named = run.label and run.key and run.config["domain"] and run.config["data_sha256"]
    whole = set(run.results) >= NEEDED and all(map(math.isfinite, read))
    if run.seed != run.config["flags"]["seed"] or not named or not whole:
        raise KeyError(run.name)


def by_domain(runs: list[FinishedRun], notes: list[str]) -> dict[str, list[Row]]:
    """Domain (and data, where one domain has several) -> its rows.

    Of equal runs the last counts; others are noted.
    """
    hashes = defaultdict(set)
    for run in runs:
        hashes[run.domain].add(run.config["data_sha256"])
    keys = {run.results.get("weights_sha256"): run.key for run in runs}
    groups: dict[str, dict[str, dict[int, FinishedRun]]] = defaultdict(lambda: defaultdict(dict))
    for run in runs:
        domain, sha = run.domain, run.config["data_sha256"]
        read = [keys.get(each, "") for entry in READ for each in run.read_by(entry)]
        name = domain if len(hashes[domain]) == 1 else f"{domain} ({sha[:8]})"
        row = groups[name]["".join([run.key, *read])]
        if run.seed in row:
            notes.append(f"{row[run.seed].name} has the flags and the seed of {run.name}")
        row[run.seed] = run
    return {domain: _named(list(rows.values())) for domain, rows in sorted(groups.items())}


def _named(rows: list[dict[int, FinishedRun]]) -> list[Row]:
    """Rows with equal labels get the flags that differ, rows of another base than most that base.

    The plain label goes to the row with most seeds; of equal ones to the one trained by distill.py,
    which has the students' settings and is what they are compared with.
    """
    by_label = defaultdict(list)
    every = [Row("", dict(sorted(runs.items()))) for runs in rows]
    bases = Counter(row.first.flags.get("base_model") for row in every)
    bases.pop(None, None)  # SASRec's
    usual = max(bases, key=bases.get, default=None)
    for row in every:
        base = row.first.flags.get("base_model") or usual
        row = row._replace(base=f", base {base}" * (base != usual))
        by_label[row.first.label + row.base].append(row)
    named: dict[str, Row] = {}
    for text, same in sorted(by_label.items()):
        same.sort(key=_precedence)
        for row in same:
            name = text
            if name in named:
                name = f"{text} [{_difference(row.first, same[0].first)}]"
            if name in named:
                name = f"{name[:-1]}, {row.first.name}]"  # a folder's name is its own
            named[name] = row._replace(label=name)
    return list(named.values())


def _precedence(row: Row) -> tuple:
    by_student = any(run.stage == "student" for run in row.runs.values())
    return -len(row.runs), not by_student, row.first.name


def _difference(run: FinishedRun, plain: FinishedRun) -> str:
    flags = run.flags
    names = []
    for name in flags:
        if name in run.counted and name in plain.flags and plain.flags[name] != flags[name]:
            names.append(name)
    return ", ".join(f"{name}={flags[name]}" for name in names[:3]) or run.name


def keep(rows: list[Row], archive: Path) -> None:
    """Write what the report reads of these runs into `archive`, and a table of their metrics."""
    archive.parent.mkdir(parents=True, exist_ok=True)
    runs = sorted((run for row in rows for run in row.runs.values()), key=lambda run: run.name)
    names = [run.name for run in runs]
    twice = next((name for name in names if names.count(name) > 1), None)
    cli.check((twice is None, f"--keep: two runs are called {twice}; move one of them"))
    with replacing(archive) as partial, zipfile.ZipFile(partial, "w") as file:
        for run in runs:
            for name, data in _kept_files(run).items():
                entry = zipfile.ZipInfo(f"{run.name}/{name}", LONG_AGO)
                entry.compress_type = zipfile.ZIP_DEFLATED
                file.writestr(entry, data)
    lines = []
    labels = {run.name: row.label for row in rows for run in row.runs.values()}
    for run in runs:
        results = run.results
        about = {"run": run.name, "row": labels[run.name], "seed": run.seed}
        about |= {name: results[name] for name in ("steps", "best_step")}
        about["valid MRR"], test = results["valid"]["sampled"]["MRR"], results["test"]
        lines.append(about | {f"{p} {name}": v for p in TABLE for name, v in test[p].items()})
    with replacing(archive.with_suffix(".csv")) as partial:
        pd.DataFrame(lines).to_csv(partial, index=False, float_format="%.6f")


def _kept_files(run: FinishedRun) -> dict[str, bytes]:
    """Of the ranks, the test ones that significance needs, in the fewest bits."""
    paths = [run.folder / name for name in KEPT]
    files = {path.name: path.read_bytes() for path in paths if path.is_file()}
    ranks = {f"test_{protocol}": run.ranks(protocol) for protocol in ("sampled", "full")}
    if all(values is not None for values in ranks.values()):
        small = {
            n: values.astype(np.min_scalar_type(int(values.max()))) for n, values in ranks.items()
        }
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **small)
        files["ranks.npz"] = buffer.getvalue()
    return files
