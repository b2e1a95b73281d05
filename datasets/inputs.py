"""What a stage reads of a domain: the files, checked against each other, and the data in them."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from datasets.domain import Domain, split_of
from datasets.interactions import Interactions
from datasets.items import Items, listing_of
from engine import checkpoint, cli
from engine.errors import UsageError
from engine.files import check_writable, file_sha256, read_json
from utils.flags import Data, Evaluation, SASRecModel, SASRecTraining, Sequence, Training

if TYPE_CHECKING:
    import torch

    from datasets.sequences import EvaluationSplit, Samples

FEW_BATCHES = 2  # fewer users than these train on every prefix


class RunData(NamedTuple):
    """What a run trains and is evaluated on.

    item_table: [N, D] on the device, row = catalogue index; None for SASRec, which makes it.
    """

    item_table: "torch.Tensor | None"
    samples: "Samples"
    splits: "dict[str, EvaluationSplit]"
    hashes: dict[str, str | None]


class Inputs(NamedTuple):
    """The files that a run is made from, checked against each other.

    csv_path, table_path: where the sequences and the item table are; SASRec has no table.
    hashes: entry of config.json (such as data_sha256) -> the present file's hash. sources: entry ->
        where that file is. items_from: what the table's vectors were made from, None where nothing
        says. items_flags: how the SASRec of the table was made; items_made_by: how each one was,
        where that says more.
    """

    domain: Domain
    data: Interactions
    csv_path: Path
    table_path: Path | None
    hashes: dict[str, str | None]
    sources: dict[str, Path]
    items_from: str | None = None
    items_flags: dict[str, Any] | None = None
    items_made_by: list[dict[str, Any]] | None = None

    def check(self, recorded: dict, owner: Path) -> None:
        """Refuse other files than those that a run, or a table, was made from.

        Args:
            recorded: its config.json, or the notes beside it. An entry that these lack, and a file
                that is not read now, are not compared.
            owner: its folder or file.
        Raises:
            UsageError: what differs is named.
        """
        names = self.differing(recorded)
        if not names:
            return
        theirs, own = str(recorded[names[0]]), self.hashes[names[0]]
        raise UsageError(
            f"{owner} was made from another file: its {names[0]} is {theirs[:12]}...,"
            f" {self.sources[names[0]]} has {own[:12]}...; {self._mend(recorded, names[0], owner)}"
        )

    def differing(self, recorded: dict) -> list[str]:
        """Entries of a config.json, or of notes, that have another hash than the present file."""
        pairs = ((name, value, recorded.get(name)) for name, value in self.hashes.items())
        return [name for name, own, theirs in pairs if None not in (own, theirs) and own != theirs]

    def _mend(self, recorded: dict, entry: str, owner: Path) -> str:
        """What to do about another hash at `entry`."""
        if entry == "items_sha256":
            kept = f"; {owner / 'items.csv'} is the right one" * (owner / "items.csv").is_file()
            return f"a number is another item there{kept}"
        flags = recorded.get("flags") or recorded.get("sasrec_flags", recorded)
        usual = self.domain.item_table if entry == "table_sha256" else None
        read = {"data_path": flags.get("data_path")}
        read["item_table"] = flags.get("item_table") or usual
        present = {"data_path": self.csv_path, "item_table": self.table_path}
        for name, path in read.items():
            if path and present[name] and Path(path) != Path(present[name]):
                return f"the run read --{name} {path}"
        if split_of(flags) != split_of(self.domain._asdict()):
            return f"the run has --split {split_of(flags)}"
        if entry != "data_sha256" and recorded.get("data_sha256") == self.data.sha256:
            return "the table was made again: run this step and the later ones with --overwrite"
        return self.domain.mend(recorded)

    @property
    def weights_have_items(self) -> bool:
        """Whether row i of some weight is item i: it means something with this data alone."""
        return self.table_path is None

    @property
    def kept(self) -> dict[str, Path]:
        """A run keeps its items.csv, which says what its numbers mean."""
        listing = listing_of(self.csv_path)
        return {"items.csv": listing} if listing.is_file() else {}

    @property
    def about(self) -> dict[str, Any]:
        """What config.json says beside the hashes."""
        about = {"domain": self.domain.name, "items_from": self.items_from}
        more = {"items_flags": self.items_flags, "items_made_by": self.items_made_by}
        return about | {name: value for name, value in more.items() if value}

    def items_sha256(self) -> str | None:
        """Of items.csv beside the CSV; None without one."""
        if not listing_of(self.csv_path).is_file():
            return None
        return Items.of(self.csv_path, self.data.item_ids).sha256()

    def settled(self, files: Data, training: Training) -> tuple[Data, Training]:
        """With how lists are read, and training targets that fit the data, where no flag says it.
        Raises UsageError: --init_from names a run of another split.
        """
        split, source = self.domain.split, Path(files.init_from or "") / "config.json"
        if files.init_from and source.is_file():
            theirs = split_of(read_json(source, "--init_from").get("flags", {}))
            if theirs != split:
                raise UsageError(
                    f"--init_from={files.init_from} was trained with --split={theirs}, this run has"
                    f" {split}: its weights may know what comes after the moment"
                )
        files = dataclasses.replace(files, split=split, ends_are_items=self.domain.ends_are_items)
        few = self.data.n_trained < FEW_BATCHES * training.batch_size
        targets = training.train_targets or ("all" if few else "last")
        return files, dataclasses.replace(training, train_targets=targets)

    def with_items(self) -> "Inputs":
        """With the hash of items.csv among the hashes, where there is one."""
        found = self.items_sha256()
        if not found:
            return self
        sources = self.sources | {"items_sha256": listing_of(self.csv_path)}
        return self._replace(hashes=self.hashes | {"items_sha256": found}, sources=sources)

    def vectors(self, path: str | Path) -> "torch.Tensor":
        """The items' rows of a table, [N, D]. The numbering of someone's own is checked."""
        from datasets.item_table import read_table

        ids, largest, listing = self.data.item_ids, None, listing_of(self.csv_path)
        if not _notes(Path(path)):
            named = Items.read(listing, ids, others=True).ids if listing.is_file() else ids
            largest = int(named[-1])
        return read_table(path, ids, largest)

    def load(
        self,
        sequence: Sequence,
        training: Training,
        evaluation: Evaluation,
        device: "torch.device | str",
        every_position: bool = False,
    ) -> RunData:
        """The item table, the training samples and the evaluation splits. Prints their sizes.

        Args:
            training: settled.
            every_position: a sample is a whole history with a target after every item.
        """
        from datasets import sequences

        table = None if self.table_path is None else self.vectors(self.table_path).to(device)
        targets = "last" if every_position else training.train_targets
        slots = sequence.max_seq_length
        samples = sequences.training_samples(self.data, targets, slots, every_position)
        splits = sequences.evaluation_splits(self.data, slots, evaluation)
        print(sequences.describe(self.data, samples, splits))
        return RunData(table, samples, splits, self.hashes)


def _notes(table_path: Path) -> dict:
    """What the .json beside an item table says; empty without one, or where it is not ours."""
    notes = table_path.with_suffix(".json")
    if not notes.is_file() or notes.read_bytes().lstrip()[:1] == b"[":  # a list is somebody else's
        return {}
    about = read_json(notes, "item table notes")
    return about if "data_sha256" in about else {}


def replaceable_table(path: Path, mark: str) -> dict:
    """What is said beside the item table that a step replaces; empty where there is none.

    Args:
        mark: an entry that this step alone writes beside its tables.
    Raises:
        UsageError: the table there is of something else, or a table cannot be written there.
    """
    cli.check((path.suffix == ".pkl", f"--item_table={path}: must end in .pkl"))
    present = [each for each in (path, path.with_suffix(".json")) if each.exists()]
    there = _notes(path) if present else {}
    if present and mark not in there:
        raise UsageError(
            f"--item_table={path}: {present[0].name} is there, and not written by this command;"
            " name another file"
        )
    check_writable(path.parent, "--item_table")
    return there


def read_sequences(files: Data, recorded: dict | None = None) -> Inputs:
    """Find and check the CSV, for SASRec and its item table. Imports no torch.

    Args:
        recorded: the flags of an earlier step, which say how list ends are read.
    Raises:
        UsageError: it is missing or wrong.
    """
    domain = Domain.of(files).read_as_in(recorded or {})
    data, csv_path = domain.read()
    start = getattr(files, "init_table", None)
    hashes = {"data_sha256": data.sha256, "init_table_sha256": start and file_sha256(start)}
    sources = {"data_sha256": csv_path, "init_table_sha256": start}
    inputs = Inputs(domain, data, csv_path, None, hashes, sources).with_items()
    if start:
        inputs.check(_notes(Path(start)), Path(start))
    return inputs


def read_inputs(files: Data, recorded: dict | None = None) -> Inputs:
    """Find and check the CSV and the item table. Imports no torch.

    Args:
        files: with an item_table.
        recorded: the flags of a run that is served, which say how list ends are read; the notes
            beside the table by default.
    Raises:
        UsageError: a file is missing or wrong, or the table was extracted from another CSV.
    """
    domain = Domain.of(files)
    table_path = Path(files.item_table or domain.item_table)
    about = _notes(table_path)
    domain = domain.read_as_in(recorded or about.get("sasrec_flags", about))
    data, csv_path = domain.read()
    if not table_path.is_file():
        raise UsageError(
            f"item table not found: {table_path}; extract_emb.py writes it"
            " (or name one with --item_table)"
        )
    table_sha256 = file_sha256(table_path)
    if about.get("table_sha256", table_sha256) != table_sha256:
        raise UsageError(
            f"{table_path} is not the table that {table_path.with_suffix('.json')} describes;"
            " run extract_emb.py again, or remove the .json if the table is your own"
        )
    hashes = {"data_sha256": data.sha256, "table_sha256": table_sha256}
    sources = {"data_sha256": csv_path, "table_sha256": table_path}
    made_from = about.get("items_from")
    kinds = (SASRecModel, SASRecTraining, Sequence)
    named = {field.name for kind in kinds for field in kind.fields()} - {"seed", "bf16"}
    recorded = about.get("sasrec_flags", {})
    flags = {name: value for name, value in recorded.items() if name in named}
    made_by = []
    for each in about.get("sasrecs", []):  # tables of before 2026-11-29 do not say it
        made = {name: value for name, value in each.items() if name in named}
        start = {"init_table": each["init_table"], "init_from": bool(each.get("init_from"))}
        made_by.append(made | {name: value for name, value in start.items() if value})
    more = flags, made_by if any(made != flags for made in made_by) else None
    inputs = Inputs(domain, data, csv_path, table_path, hashes, sources, made_from, *more)
    inputs = inputs.with_items()
    inputs.check(about, table_path)
    _report_newer(about)
    return inputs


def _report_newer(about: dict) -> None:
    """Say where a SASRec was trained again after its table was written."""
    folders, known = about.get("sasrec", ""), about.get("sasrec_sha256", "")
    for folder, recorded in zip(folders.split(","), known.split(",")):
        manifest = Path(folder) / "best" / checkpoint.MANIFEST
        found = read_json(manifest, "checkpoint") if folder and manifest.is_file() else {}
        if found.get(checkpoint.WEIGHTS, recorded) != recorded:
            print(
                f"{folder} holds another SASRec now than the one the item table is of;"
                " extract_emb.py makes a new table"
            )
