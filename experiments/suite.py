"""What the experiments share: runs of the scripts below one folder, a folder per seed.

The scripts themselves read a finished run instead of repeating it, and resume an unfinished one.
"""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import distill
import extract_emb
import finetune
import train_sr_trad
from datasets.domain import Domain
from engine import cli
from engine.cli import flag
from engine.errors import UsageError
from engine.files import read_json
from utils.flags import Data

SCRIPTS = {"sasrec": train_sr_trad.main, "teacher": finetune.main, "student": distill.main}


@dataclass(frozen=True, kw_only=True)
class SuiteFlags(Data):
    """The experiment"""

    kind: ClassVar[str] = "free"
    base_model: str = flag("tiny", "of teacher and students")
    seeds: list[int] = flag([42], "a run of everything for each, SASRec included")
    sasrec_flags: str = flag("", "flags of train_sr_trad.py, in quotes")
    teacher_flags: str = flag("--num_epochs 10", "flags of finetune.py, in quotes")
    output_dir: str | None = flag(None, "where the runs go; output/<domain>/paper by default")
    device: Literal["auto", "cpu", "cuda"] = flag("auto", "auto uses cuda if available")
    overwrite: bool = flag(False, "repeat what is finished")


@dataclass(frozen=True)
class Suite:
    """Runs of one domain: root/seed<S>/{sasrec, sasrec_item.pkl, teacher, ...}.

    data: the scripts' flags for the domain's data.
    extra: stage -> flags that its script always gets.
    overwrite: repeat what is finished.
    """

    root: Path
    data: dict[str, Any]
    extra: dict[str, dict[str, Any]]
    overwrite: bool

    def run(self, stage: str, seed: int, name: str, **flags: Any) -> Path:
        """Run a stage into its folder.

        Raises:
            UsageError: the folder holds a run with other flags or from other files.
        """
        folder = self.folder(seed) / name
        flags = self.data | self.extra[stage] | flags | {"seed": seed, "output_dir": str(folder)}
        if stage != "sasrec":
            flags["item_table"] = str(self.table(seed))
        print(f"\n== {folder}: {stage}", flush=True)
        SCRIPTS[stage](**flags, overwrite=self.overwrite)
        return folder

    def item_table(self, seed: int) -> Path:
        """Steps 1 and 2."""
        table = self.table(seed)
        sasrec = self.run("sasrec", seed, "sasrec")
        trained = read_json(sasrec / "results.json", "SASRec results")["weights_sha256"]
        notes = table.with_suffix(".json")
        there = table.is_file() and notes.is_file()
        if not there or read_json(notes, "item table notes").get("sasrec_sha256") != trained:
            extract_emb.main(**self.data, sasrec=str(sasrec), item_table=str(table))
        return table

    def folder(self, seed: int) -> Path:
        return self.root / f"seed{seed}"

    def table(self, seed: int) -> Path:
        return self.folder(seed) / "sasrec_item.pkl"


def open_suite(given: SuiteFlags, texts: dict[str, str]) -> Suite:
    """Check the flags meant for each script and find the data, before any work.

    Args:
        texts: stage -> a command line's flags for its script, e.g. {"sasrec": "--num_epochs 3"}.
    Raises:
        UsageError: a flag that its script does not have, or the data is missing.
    """
    extra: dict[str, dict[str, Any]] = {}
    for stage, text in texts.items():
        try:
            extra[stage] = cli.bind(SCRIPTS[stage], shlex.split(text))
        except (UsageError, ValueError) as error:
            raise UsageError(f"--{stage}_flags={text}: {error}") from None
        known = cli.flags_of(SCRIPTS[stage])
        for name in extra[stage]:
            ours = name in given.values() or name in ("seed", "eval_only")
            if ours or known[name].group.kind == "files":
                raise UsageError(f"--{stage}_flags={text}: --{name} is set by the experiment")
        extra[stage]["device"] = given.device
        if stage != "sasrec":
            extra[stage]["base_model"] = given.base_model
    domain = Domain.of(given)
    domain.read()
    data = dict(zip(("domain_type", "data_path", "ends_are_items", "split"), domain))
    root = Path(given.output_dir or domain.folder / "paper")
    return Suite(root, data, extra, given.overwrite)
