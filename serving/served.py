"""Finished runs as models to serve: which run, and the files that it was made from."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from datasets.domain import STAGES, Domain, canonical_domain, split_of
from datasets.inputs import Inputs
from datasets.interactions import Interactions
from datasets.items import Items, listing_of
from engine.cli import flag
from engine.errors import UsageError
from engine.files import file_sha256, read_json
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
    """A finished run, and the files that it was made from.

    table_path: the item table; None for SASRec, which has its own.
    """

    run: Run
    domain: Domain
    data: Interactions
    csv_path: Path
    table_path: Path | None

    def item_ids(self, unseen: bool = False) -> np.ndarray:
        """The items to recommend from, ascending; `unseen`: all that have a vector."""
        from datasets.item_table import ids_with_vectors

        if not unseen or self.table_path is None:
            return self.data.item_ids
        return np.union1d(self.data.item_ids, ids_with_vectors(self.table_path))

    def popularity(self, item_ids: np.ndarray) -> "Tensor":
        """How often each item occurs; float32 [N]."""
        import torch

        data = self.data
        if data.moment is not None:  # lists are for now: all interactions count
            data, _ = self.domain._replace(split=None).read()
        counts = np.zeros(len(item_ids), dtype=np.float32)
        place = np.searchsorted(item_ids, self.data.item_ids)
        counts[place] = np.bincount(data.items, minlength=data.n_items)
        return torch.from_numpy(counts)

    def names(self, item_ids: np.ndarray) -> Items:
        """What items are called: as items.csv beside the CSV says, else as the run's own does."""
        own = self.run.folder / "items.csv"
        if own.is_file() and not listing_of(self.csv_path).is_file():
            return Items.read(own, item_ids)
        return Items.of(self.csv_path, item_ids)

    def item_table(self, item_ids: np.ndarray) -> "Tensor | None":
        """The items' rows; float32 [N, D]."""
        from datasets.item_table import read_table

        return self.table_path and read_table(self.table_path, item_ids)


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
        found = [pair for pair in every if split_of(_flags(pair[0])) == domain.split]
    if not found:
        raise UsageError(f"--model=best: no finished run in {domain.folder}/*; train one first")
    if len({results["data_sha256"] for _, results in found}) > 1:
        found = _of_present_data(domain, found) or found
    newest = max(found, key=lambda pair: pair[0].stat().st_mtime)[1]["data_sha256"]
    found = [pair for pair in found if pair[1]["data_sha256"] == newest]
    path, results = max(found, key=lambda pair: pair[1]["valid"]["full"]["MRR"])
    best = results["valid"]["full"]["MRR"]
    print(f"best of {len(found)} runs: {path.parent}, validation MRR {best:.4f} (whole catalogue)")
    if len(every) > len(found):
        print(f"left out: {len(every) - len(found)} runs of other data or another split")
    return path.parent


def _flags(results: Path) -> dict:
    """The recorded flags of the run that results.json is of."""
    return read_json(results.with_name("config.json"), "run").get("flags", {})


def _of_present_data(domain: Domain, found: list[tuple[Path, dict]]) -> list[tuple[Path, dict]]:
    """Of results.json files those of runs that were made from the CSV as it is now."""
    kept, present = [], {}  # how lists are read -> the data's hash
    for path, results in found:
        flags = _flags(path)
        data_path = domain.data_path or flags.get("data_path")
        own = domain._replace(split=None, data_path=data_path).read_as_in(flags)
        if own not in present:
            present[own] = own.read()[0].sha256
        kept += [(path, results)] if present[own] == results["data_sha256"] else []
    return kept


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
        if other.data.sha256 != found[0].data.sha256 or len(items) > 1:
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
    domain = Domain.of(files)._replace(name=own, data_path=path).read_as_in(run.flags)
    data, csv_path = domain.read()
    hashes, sources = {"data_sha256": data.sha256}, {"data_sha256": csv_path}
    table_path = None
    if run.stage != "sasrec":
        table_path = Path(files.item_table or run.flags.get("item_table") or domain.item_table)
        if not table_path.is_file():
            raise UsageError(f"item table not found: {table_path}; name it with --item_table")
        hashes["table_sha256"] = file_sha256(table_path)
        sources["table_sha256"] = table_path
    inputs = Inputs(domain, data, csv_path, table_path, hashes, sources)
    run.check_same(inputs)
    recorded, found = run.config.get("items_sha256"), inputs.items_sha256()
    if recorded and found and recorded != found:
        raise UsageError(
            f"{listing_of(csv_path)} is not the one that {run.folder} was trained beside: a number"
            f" is another item there; {run.folder / 'items.csv'} is the right one"
        )
    run.report_unfinished()
    return Served(run, domain, data, csv_path, table_path)
