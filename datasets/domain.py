"""A domain: its name, its files, every default path.

And what steps 3 and 4 read of it before any model.
"""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from datasets.demo import write_demo
from datasets.interactions import Interactions, read_csv
from utils.errors import UsageError
from utils.files import file_sha256, read_json
from utils.flags import Data, ServedFiles, StudentFiles, TeacherFiles
from utils.run import REBUILD, STAGES, Run

if TYPE_CHECKING:
    from torch import Tensor

ALIASES = {"cloths": "cloth", "movies": "movie"}  # spellings of the released scripts
SUFFIXES = (".csv", ".csv.gz", ".csv.xz")
FOLDERS = ("data", "dataset/sequential")
DEMO = Path("data/demo.csv")


class Domain(NamedTuple):
    """A domain, where its CSV is if not in the usual places, and how list ends are read."""

    name: str
    data_path: str | None
    ends_are_items: bool = False

    @classmethod
    def of(cls, files: Data) -> "Domain":
        """The domain of a script's flags.

        Raises:
            UsageError: the name is not one path component.
        """
        return cls(canonical_domain(files.domain_type), files.data_path, files.ends_are_items)

    def read_as_in(self, recorded: dict[str, Any]) -> "Domain":
        """This domain with the ends of lists read as an earlier step's flags say."""
        ends_are_items = self.ends_are_items or bool(recorded.get("ends_are_items"))
        return self._replace(ends_are_items=ends_are_items)

    @property
    def folder(self) -> Path:
        """Where the steps' folders and the item table are by default."""
        return Path("output") / self.name

    @property
    def item_table(self) -> Path:
        return self.folder / "sasrec_item.pkl"

    def teacher(self, files: StudentFiles) -> tuple[Path, Path | None]:
        """The teacher's folder, and where its states are kept; None runs it in every step.

        Raises:
            UsageError: the cache is a file.
        """
        folder = Path(files.teacher or self.folder / "teacher")
        place = files.teacher_cache
        if place.lower() == "off":
            return folder, None
        cache = folder.parent / "teacher_states" if place.lower() == "auto" else Path(place)
        if not place or (cache.exists() and not cache.is_dir()):
            raise UsageError(f"--teacher_cache={place}: expected a folder, auto or off")
        return folder, cache

    def read(self) -> tuple[Interactions, Path]:
        """The sequences, and the CSV that they are from. The demo domain is made on first use.

        Raises:
            UsageError: the CSV is missing or not what interactions.py expects.
        """
        if self.name == "demo" and self.data_path is None and not DEMO.exists():
            write_demo(DEMO)
            print(f"made the demo domain: {DEMO}", flush=True)
        path = find_csv(self.name, self.data_path)
        return read_csv(path, self.ends_are_items), path


def canonical_domain(domain_type: str) -> str:
    """The domain's name, and so its folder under output/.

    Raises:
        UsageError: the name is not one path component.
    """
    domain = ALIASES.get(domain_type, domain_type)
    if not domain or domain.startswith(".") or {"/", "\\"} & set(domain):
        raise UsageError(f"--domain_type={domain_type}: must be a plain name such as beauty")
    return domain


def find_csv(domain: str, data_path: str | None = None) -> Path:
    """The domain's CSV: `data_path`, else data/<domain>.csv[.gz|.xz], else in dataset/sequential/.

    Raises:
        UsageError: no such file; the line says where it was looked for and which domains are there.
    """
    if data_path is not None:
        path = Path(data_path)
        if not path.exists():
            raise UsageError(f"data file not found: {path} (from --data_path)")
        return path
    looked = candidates(domain)
    present = [path for path in looked if path.exists()]
    if present:
        if present[1:]:
            others = ", ".join(map(str, present[1:]))
            print(f"reading {present[0]}; not read: {others}", flush=True)
        return present[0]
    there = [path.name for folder in FOLDERS for path in Path(folder).glob("*.csv*")]
    domains = sorted({name.split(".")[0] for name in there if ".items." not in name})
    raise UsageError(
        f"data file not found: {looked[0]} (from --domain_type {domain});"
        f" looked in {', '.join(FOLDERS)}; available: {', '.join(domains) or 'none'};"
        " --data_path names a file elsewhere"
    )


def candidates(domain: str) -> list[Path]:
    """Where a domain's CSV may be, the first place first."""
    names = [domain, *(alias for alias, name in ALIASES.items() if name == domain)]
    places = [Path(folder) / name for name in names for folder in FOLDERS]
    return [place.with_name(place.name + suffix) for place in places for suffix in SUFFIXES]


class Inputs(NamedTuple):
    """What steps 3 and 4 read before any model: the sequences and the item table, checked against
    each other.

    csv_path, table_path: where they are from. table_sha256: of the table's file. items_from: what
        its vectors were made from, None where nothing says.
    """

    domain: Domain
    data: Interactions
    csv_path: Path
    table_path: Path
    table_sha256: str
    items_from: str | None

    @property
    def hashes(self) -> dict[str, str]:
        """Field of config.json -> hash of the file that a run is made from."""
        return {"data_sha256": self.data.sha256, "table_sha256": self.table_sha256}

    @property
    def sources(self) -> tuple[Path, Path]:
        """Where the files of `hashes` are."""
        return self.csv_path, self.table_path

    def item_table(self) -> "Tensor":
        """The item table's rows in catalogue order, float32 [N, D]."""
        from datasets.item_table import read_table

        return read_table(self.table_path, self.data.item_ids)


class Served(NamedTuple):
    """A finished run, and the files that it was made from.

    table_path: the item table; None for SASRec, which has its own.
    """

    run: Run
    data: Interactions
    csv_path: Path
    table_path: Path | None

    def item_ids(self, unseen: bool = False) -> np.ndarray:
        """The items to recommend from, ascending: those of the data, and with `unseen` the others
        that the item table has vectors for.
        """
        from datasets.item_table import ids_with_vectors

        if not unseen or self.table_path is None:
            return self.data.item_ids
        return np.union1d(self.data.item_ids, ids_with_vectors(self.table_path))

    def popularity(self, item_ids: np.ndarray | None = None) -> "Tensor":
        """How often each item occurs, by default of the data's; float32 [N]."""
        import torch

        counts = np.bincount(self.data.items, minlength=self.data.n_items).astype(np.float32)
        if item_ids is not None:
            known = np.zeros(len(item_ids), dtype=np.float32)
            known[np.searchsorted(item_ids, self.data.item_ids)] = counts
            counts = known
        return torch.from_numpy(counts)

    def item_table(self, item_ids: np.ndarray | None = None) -> "Tensor | None":
        """The items' rows, by default the data's in catalogue order; float32 [N, D]."""
        from datasets.item_table import read_table

        item_ids = self.data.item_ids if item_ids is None else item_ids
        return self.table_path and read_table(self.table_path, item_ids)


def is_export(folder: Path) -> bool:
    """Whether export.py wrote the folder."""
    return (folder / "recommender.json").is_file()


def read_all_served(files: ServedFiles) -> list[Served]:
    """As `read_served`, for `--model` with one name or several between commas.

    Raises:
        UsageError: also where they are of different data.
    """
    names = files.model.split(",")
    if names[1:] and files.item_table:
        raise UsageError(
            f"--item_table={files.item_table}: of several models each reads its own table"
        )
    found = [read_served(dataclasses.replace(files, model=name.strip())) for name in names]
    for other in found[1:]:
        if other.data.sha256 != found[0].data.sha256:
            raise UsageError(
                f"--model={files.model}: {found[0].run.folder} and {other.run.folder} are of"
                " different data"
            )
    return found


def read_served(files: ServedFiles) -> Served:
    """Find a run, and the CSV and item table that it was made from. Imports no torch.

    Files that are not named are those that the run's own command read.

    Raises:
        UsageError: something is missing, or is not what the run was made from.
    """
    named = files.model in STAGES
    folder = Domain.of(files).folder / files.model if named else Path(files.model)
    if not (folder / "config.json").is_file():
        maker = STAGES.get(files.model, "one of the four scripts")
        raise UsageError(f"--model={files.model}: no run in {folder}; {maker} makes it")
    if is_export(folder):
        raise UsageError(f"--model={files.model}: an export, not a run; name the run's folder")
    stage = read_json(folder / "config.json", "run").get("step")
    run = Run.read(stage if stage in STAGES else "trained", folder, "--model")
    if not (folder / "best").is_dir() and not (folder / ".old-best").is_dir():
        raise UsageError(f"--model={files.model}: {folder} has no checkpoint best/; train first")
    recorded = run.flags
    name = files.domain_type if named else run.config.get("domain", files.domain_type)
    path = files.data_path or recorded.get("data_path")
    domain = Domain(canonical_domain(name), path, files.ends_are_items).read_as_in(recorded)
    data, csv_path = domain.read()
    hashes, table_path = {"data_sha256": data.sha256}, None
    if stage != "sasrec":
        table_path = Path(files.item_table or recorded.get("item_table") or domain.item_table)
        if not table_path.is_file():
            raise UsageError(f"item table not found: {table_path}; name it with --item_table")
        hashes["table_sha256"] = file_sha256(table_path)
    run.check_same(hashes, *[path for path in (csv_path, table_path) if path])
    run.report_unfinished()
    return Served(run, data, csv_path, table_path)


def read_inputs(files: TeacherFiles) -> Inputs:
    """Find and check the CSV and the item table. Imports no torch.

    Raises:
        UsageError: a file is missing or wrong, or the table was extracted from another CSV.
    """
    domain = Domain.of(files)
    table_path = Path(files.item_table or domain.item_table)
    notes = table_path.with_suffix(".json")
    about = read_json(notes, "item table notes") if notes.is_file() else {}
    domain = domain.read_as_in(about.get("sasrec_flags", about))
    data, csv_path = domain.read()
    if not table_path.is_file():
        raise UsageError(
            f"item table not found: {table_path}; extract_emb.py writes it"
            " (or name one with --item_table)"
        )
    table_sha256 = file_sha256(table_path)
    if about:
        made_from = about.get("data_sha256")
        if made_from != data.sha256:
            raise UsageError(
                f"{table_path} was extracted from a CSV with sha256 {str(made_from)[:12]}...,"
                f" {csv_path} has {data.sha256[:12]}...; where the data has changed, {REBUILD}"
            )
        if about.get("table_sha256", table_sha256) != table_sha256:
            raise UsageError(
                f"{table_path} is not the table that {notes} describes; run extract_emb.py again,"
                " or remove the .json if the table is your own"
            )
    items_from = about.get("items_from")
    return Inputs(domain, data, csv_path, table_path, table_sha256, items_from)
