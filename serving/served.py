"""Finished runs as models to serve: which run, and the files that it was made from."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from datasets.domain import STAGES, Domain, canonical_domain, split_of
from datasets.inputs import Inputs, read_inputs, read_sequences
from datasets.items import Items, listing_of
from engine.cli import flag
from engine.errors import UsageError
from engine.files import read_json
from engine.run import Run, run_names
from utils.flags import Data, ItemTable

if TYPE_CHECKING:
    from torch import Tensor


class ServedFiles(ItemTable, Data):
    """Files; by default those that the run was made from"""

    model: str = flag(
        "best",
        "best (of the domain's runs, on validation), sasrec, teacher or student, or the folder of "
        "a run; the scores of several runs between commas are added, each divided by "
        "their standard deviation",
    )


class Served(NamedTuple):
    """A finished run, and the files that it was made from."""

    run: Run
    inputs: Inputs

    def item_ids(self, unseen: bool = False) -> np.ndarray:
        """The items to recommend from, ascending; `unseen`: all that have a vector."""
        from datasets.item_table import ids_with_vectors

        ids, table_path = self.inputs.data.item_ids, self.inputs.table_path
        if not unseen or table_path is None:
            return ids
        return np.union1d(ids, ids_with_vectors(table_path))

    def popularity(self, item_ids: np.ndarray) -> "Tensor":
        """How often each item occurs; float32 [N]."""
        import torch

        data = self.inputs.data
        place = np.searchsorted(item_ids, data.item_ids)
        if data.moment is not None:  # lists are for now: all interactions count
            data, _ = self.inputs.domain._replace(split=None).read()
        counts = np.zeros(len(item_ids), dtype=np.float32)
        counts[place] = np.bincount(data.items, minlength=data.n_items)
        return torch.from_numpy(counts)

    def names(self, item_ids: np.ndarray) -> Items:
        """What items are called: as items.csv beside the CSV says, else as the run's own does."""
        own, csv_path = self.run.folder / "items.csv", self.inputs.csv_path
        if own.is_file() and not listing_of(csv_path).is_file():
            return Items.read(own, item_ids)
        return Items.of(csv_path, item_ids)

    def item_table(self, item_ids: np.ndarray) -> "Tensor | None":
        """The items' rows; float32 [N, D]."""
        from datasets.item_table import read_table

        table_path = self.inputs.table_path
        return table_path and read_table(table_path, item_ids)


def is_export(folder: Path) -> bool:
    """Whether serving.export wrote the folder."""
    return (folder / "recommender.json").is_file()


def best_run(domain: Domain) -> Path:
    """Of the domain's finished runs the one of the highest validation MRR over the whole catalogue,
    which no candidates decide; it is printed. Runs of other data than the newest one's are left
    out. Raises UsageError: there is none.
    """
    every = []
    for path in sorted(domain.folder.glob("*/results.json")):
        results = read_json(path, "results")
        whole = results.get("steps") is not None and {"data_sha256", "valid"} <= results.keys()
        if whole and (path.parent / "best").is_dir():
            every.append((path, results))
    found = every
    if domain.split is not None:
        found = [pair for pair in every if _split(pair[0]) == domain.split]
    if not found:
        raise UsageError(f"--model=best: no finished run in {domain.folder}/*; train one first")
    newest = max(found, key=lambda pair: pair[0].stat().st_mtime)[1]["data_sha256"]
    found = [pair for pair in found if pair[1]["data_sha256"] == newest]
    path, results = max(found, key=lambda pair: pair[1]["valid"]["full"]["MRR"])
    best = results["valid"]["full"]["MRR"]
    print(f"best of {len(found)} runs: {path.parent}, validation MRR {best:.4f} (whole catalogue)")
    if len(every) > len(found):
        print(f"left out: {len(every) - len(found)} runs of other data or another split")
    return path.parent


def _split(results: Path) -> str:
    """The split of the run that results.json is of."""
    return split_of(read_json(results.with_name("config.json"), "run").get("flags", {}))


def read_all(files: ServedFiles) -> list[Served]:
    """The runs of `--model`: one name, or several between commas. Imports no torch. Raises
    UsageError: as `read`, or they are of different data.
    """
    names = run_names(files.model, "model")
    if names[1:] and files.item_table:
        raise UsageError(
            f"--item_table={files.item_table}: of several models each reads its own table"
        )
    found = [read(dataclasses.replace(files, model=name)) for name in names]
    for other in found[1:]:
        runs = found[0].run, other.run
        items = {run.config.get("items_sha256") for run in runs} - {None}
        if other.inputs.data.sha256 != found[0].inputs.data.sha256 or len(items) > 1:
            raise UsageError(
                f"--model={files.model}: {runs[0].folder} and {runs[1].folder} are of different"
                f" {'items.csv' if len(items) > 1 else 'data'}"
            )
    return found


def _run_of(model: str, domain: Domain) -> Run:
    """The run that --model names."""
    folder = domain.run_folder(model, None) if model in STAGES else Path(model)
    folder = best_run(domain) if model == "best" else folder
    if not (folder / "config.json").is_file():
        maker = STAGES.get(model, "one of the four scripts")
        runs = sorted(path.parent.name for path in domain.folder.glob("*/config.json"))
        there = f"; {domain.folder} has {', '.join(runs)}" if runs else ""
        raise UsageError(f"--model={model}: no run in {folder}; {maker} makes it{there}")
    if is_export(folder):
        raise UsageError(f"--model={model}: an export, not a run; name the run's folder")
    stage = read_json(folder / "config.json", "run").get("step")
    run = Run.read(stage if stage in STAGES else "trained", folder, "--model")
    if not run.has_best:
        raise UsageError(f"--model={model}: {folder} has no checkpoint best/; train first")
    if not isinstance(run.flags.get("max_seq_length"), int):
        raise UsageError(f"{folder / 'config.json'}: damaged, its flags lack max_seq_length")
    return run


def read(files: ServedFiles) -> Served:
    """Find a run, and the CSV and item table that it was made from.

    Files that are not named are those that the run's own command read.

    Raises:
        UsageError: something is missing, or is not what the run was made from.
    """
    run = _run_of(files.model, Domain.of(files))
    own = run.config.get("domain", files.domain_type)
    named = "domain_type" in files.given or files.domain_type != Data().domain_type
    if named and canonical_domain(files.domain_type) != own:
        raise UsageError(
            f"--domain_type={files.domain_type}: the run in {run.folder} is of the domain {own};"
            " leave --domain_type out, or name a model of that domain"
        )
    path = files.data_path or run.flags.get("data_path")
    table_path = files.item_table or run.flags.get("item_table")
    files = dataclasses.replace(files, domain_type=own, data_path=path, item_table=table_path)
    inputs = (read_sequences if run.stage == "sasrec" else read_inputs)(files, run.flags)
    run.check_same(inputs)
    run.report_unfinished()
    return Served(run, inputs)
