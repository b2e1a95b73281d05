"""The finished runs below a folder, and which of them are one row of a table."""

import json
import math
import shutil
import zipfile
import zlib
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.rows import label, plain_ce
from experiments.runs import SCRIPTS
from utils import cli, runlog

KEPT = ("config.json", "results.json", "metrics.jsonl")
DRAWN = ("motivation.csv", "motivation.md", "motivation.png")
NO_PART = (*runlog.PLACES, *runlog.HARMLESS, "log_steps", "save_steps", "seed", "domain_type", "bf16")  # flags that make no other row
NEEDED = {"test", "valid", "users", "parameters", "trainable_parameters"}


class Run(NamedTuple):
    """One finished run: its folder, the folder's name below the root, config.json, results.json."""

    folder: Path
    name: str
    config: dict[str, Any]
    results: dict[str, Any]

    @property
    def seed(self) -> int:
        return self.results["seed"]

    @property
    def step(self) -> str:
        return self.config["step"]

    @property
    def flags(self) -> dict[str, Any]:
        """As recorded; one that came after the run has its default."""
        return cli.defaults(SCRIPTS[self.step]) | self.config["flags"]

    @property
    def label(self) -> str:
        return label(self.step, self.flags)

    @property
    def key(self) -> str:
        """What the run is, whatever its seed and place. A student trained by cross-entropy alone is what finetune.py trains."""
        step, flags = self.step, self.flags
        names = set(flags) - {*NO_PART}
        if step != "sasrec" and plain_ce(step, flags):
            step = "llm"
            names &= set(cli.defaults(SCRIPTS["teacher"])) & set(cli.defaults(SCRIPTS["student"]))
            names -= {"distill_block", "cls_multiple_lambda", "block_reduction"}
        layers = None if flags.get("layer_selection") == "influence" else self.config.get("model", {}).get("layers")  # each seed chooses
        return json.dumps([step, layers, bool(self.config.get("bf16")), {name: flags[name] for name in sorted(names)}])

    def ranks(self, protocol: str) -> np.ndarray | None:
        """Test ranks of all users [U], 1 the best; None where they are missing or torn."""
        try:
            with np.load(self.folder / "ranks.npz", allow_pickle=False) as ranks:
                return ranks[f"test_{protocol}"].astype(np.float64)
        except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, zlib.error):
            return None

    def taught_by(self, teacher: "Run") -> bool:
        """By the weights' hash; runs that do not record it, by their folders."""
        place, known = self.config.get("teacher"), self.config.get("teacher_sha256")
        if teacher.step != "teacher" or not place or teacher.config["data_sha256"] != self.config["data_sha256"]:
            return False
        return teacher.results.get("weights_sha256") == known if known else Path(place).parts[-2:] == teacher.folder.parts[-2:]


class Row(NamedTuple):
    """Runs that differ in their seed alone, by seed."""

    label: str
    runs: dict[int, Run]

    @property
    def first(self) -> Run:
        return next(iter(self.runs.values()))


def read_runs(root: Path) -> tuple[list[Run], list[str]]:
    """Every finished run below `root`, finetune.py's before distill.py's, and a note on each folder that was passed over."""
    found, notes = [], []
    for path in sorted(root.rglob("config.json")):
        folder = path.parent
        try:
            config = runlog.read_json(path, "run")
            if config.get("step") not in list(SCRIPTS):
                continue
            if not runlog.finished(folder):
                notes.append(f"{folder.relative_to(root)} is unfinished")
                continue
            run = Run(folder, folder.relative_to(root).as_posix(), config, runlog.read_json(folder / "results.json", "results"))
            read = [run.results[split][protocol]["MRR"] for split in ("valid", "test") for protocol in ("sampled", "full", "full_all")]
            named = run.label and run.key and config["domain"] and config["data_sha256"]
            if run.seed != config["flags"]["seed"] or not named or not set(run.results) >= NEEDED or not all(map(math.isfinite, read)):
                raise KeyError
        except (cli.UsageError, KeyError, TypeError, AttributeError) as problem:
            reason = str(problem) if isinstance(problem, cli.UsageError) else "its config.json or results.json lacks something"
            notes.append(f"{folder.relative_to(root)}: {reason}")
            continue
        found.append(run)
    return sorted(found, key=lambda run: [*SCRIPTS].index(run.step)), notes


def by_domain(runs: list[Run], notes: list[str]) -> dict[str, list[Row]]:
    """Domain (and data, where one domain has several) -> its rows, of equal runs the last; others are noted."""
    hashes = defaultdict(set)
    for run in runs:
        hashes[run.config["domain"]].add(run.config["data_sha256"])
    groups: dict[str, dict[str, dict[int, Run]]] = defaultdict(lambda: defaultdict(dict))
    for run in runs:
        domain, sha = run.config["domain"], run.config["data_sha256"]
        teacher = next((other.key for other in runs if run.taught_by(other)), "")
        row = groups[domain if len(hashes[domain]) == 1 else f"{domain} ({sha[:8]})"][run.key + teacher]
        if run.seed in row:
            notes.append(f"{row[run.seed].name} has the flags and the seed of {run.name}")
        row[run.seed] = run
    return {domain: _named(list(rows.values())) for domain, rows in sorted(groups.items())}


def _named(rows: list[dict[int, Run]]) -> list[Row]:
    """Rows of equal label are told apart by the flags that differ. The plain label goes to the one that most seeds have, of
    equals to the one trained by distill.py: with the students' settings, it is what they are compared with."""
    by_label = defaultdict(list)
    for runs in rows:
        row = Row("", dict(sorted(runs.items())))
        by_label[row.first.label].append(row)
    named: dict[str, Row] = {}
    for text, same in sorted(by_label.items()):
        same.sort(key=lambda row: (-len(row.runs), not any(run.step == "student" for run in row.runs.values()), row.first.name))
        for row in same:
            name = text
            if name in named:
                name = f"{text} [{_difference(row.first, same[0].first)}]"
            if name in named:
                name = f"{name[:-1]}, {row.first.name}]"  # a folder's name is its own
            named[name] = row._replace(label=name)
    return list(named.values())


def _difference(run: Run, plain: Run) -> str:
    names = [name for name, value in run.flags.items() if name not in NO_PART and name in plain.flags and plain.flags[name] != value]
    return ", ".join(f"{name}={run.flags[name]}" for name in names[:3]) or run.name


def keep_all(runs: list[Run], root: Path, kept: Path) -> None:
    """Copy what the report reads; copies kept earlier of runs on the same data that are not among these go, so that none is stale."""
    for run in runs:
        _keep(run, kept / run.name)
    for name in DRAWN:
        if (root / name).is_file():
            shutil.copyfile(root / name, kept / name)
    ours, data = {run.name for run in runs}, {run.config["data_sha256"] for run in runs}
    for path in sorted(kept.rglob("config.json")):
        folder = path.parent
        copy = {file.name for file in folder.iterdir()} <= {*KEPT, "ranks.npz"}  # a run itself has checkpoints too
        if copy and folder.relative_to(kept).as_posix() not in ours and runlog.read_json(path, "kept run").get("data_sha256") in data:
            shutil.rmtree(folder)


def _keep(run: Run, folder: Path) -> None:
    """What the report reads of a run; of the ranks the test ones that significance needs, in the fewest bits."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in KEPT:
        shutil.copyfile(run.folder / name, folder / name)
    (folder / "ranks.npz").unlink(missing_ok=True)
    ranks = {f"test_{protocol}": run.ranks(protocol) for protocol in ("sampled", "full")}
    if all(values is not None for values in ranks.values()):
        np.savez_compressed(folder / "ranks.npz", **{name: values.astype(np.min_scalar_type(int(values.max()))) for name, values in ranks.items()})
