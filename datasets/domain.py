"""A domain: its name, its files and folders, and every default path."""

from decimal import Decimal
from pathlib import Path
from typing import NamedTuple

from datasets.demo import write_demo
from datasets.interactions import Interactions, read_csv
from datasets.items import listing_of, read_listing
from engine.errors import UsageError
from engine.run import Run, run_names
from utils.flags import Data, Runtime, TeacherFiles, TeacherLoss

ALIASES = {"cloths": "cloth", "movies": "movie"}  # spellings of the released scripts
SUFFIXES = (".csv", ".csv.gz", ".csv.xz")
FOLDERS = ("data", "dataset/sequential")
DEMO = Path("data/demo.csv")
STAGES = {"sasrec": "train_sr_trad.py", "teacher": "finetune.py", "student": "distill.py"}
REBUILD = (  # what to do after the data has changed
    "run every step again in order: train_sr_trad.py --overwrite, extract_emb.py, then the others"
    " with --overwrite (another --split is other data too)"
)
LEAVE_ONE_OUT = "leave_one_out"


class Domain(NamedTuple):
    """A domain, where its CSV is if not in the usual places, and how its lists are read."""

    name: str
    data_path: str | None
    ends_are_items: bool = False
    split: str | None = None

    @classmethod
    def of(cls, files: Data) -> "Domain":
        """The domain of a script's flags. Raises UsageError: the name is not one path component."""
        name = canonical_domain(files.domain_type)
        kind, _, share = (files.split or "").partition(":")
        split = f"{kind}:{Decimal(share).normalize()}" if share else files.split  # .90 is 0.9
        return cls(name, files.data_path, files.ends_are_items, split)

    def read_as_in(self, recorded: dict) -> "Domain":
        """This domain with its lists read as an earlier step's flags say. Raises UsageError: that
        step split the data in another way.
        """
        split = split_of(recorded)
        if recorded and self.split not in (None, split):
            raise UsageError(f"--split={self.split} contradicts the earlier step's {split}")
        ends_are_items = self.ends_are_items or bool(recorded.get("ends_are_items"))
        return self._replace(ends_are_items=ends_are_items, split=self.split or split)

    @property
    def folder(self) -> Path:
        """Where the steps' folders and the item table are by default."""
        return Path("output") / self.name

    @property
    def item_table(self) -> Path:
        return self.folder / "sasrec_item.pkl"

    def run_folder(self, stage: str, given: str | None) -> Path:
        """A stage's folder: as given, or output/<domain>/<stage>."""
        return Path(given or self.folder / stage)

    def mend(self, config: dict) -> str:
        """What to do about a run, or a table, that was made from other files."""
        theirs = config.get("domain", self.name)
        if theirs != self.name:
            return f"it is of the domain {theirs}, this is {self.name}: name another"
        return f"where the data has changed, {REBUILD}"

    def earlier_run(self, stage: str, given: str | None) -> Run:
        """The run of an earlier stage that `--<stage>` names, by default the domain's. Raises
        UsageError: there is no such run.
        """
        return Run.read(stage, self.run_folder(stage, given), f"--{stage}", STAGES[stage])

    def sasrec_runs(self, files: TeacherFiles, loss: TeacherLoss, runtime: Runtime) -> list[Run]:
        """The runs of step 1 that teach; none where SASRec's KL has no weight. Raises UsageError:
        there is no such run.
        """
        if not loss.sasrec_lambda or runtime.eval_only:
            return []
        return self.sasrecs(files.sasrec)

    def sasrecs(self, named: str | None) -> list[Run]:
        """The runs of step 1 that `--sasrec` names, separated by commas. Raises UsageError: there
        is no such run.
        """
        names = run_names(named, "sasrec") if named else [None]
        return [self.earlier_run("sasrec", name) for name in names]

    def read(self) -> tuple[Interactions, Path]:
        """The sequences, and the CSV that they are from. The demo domain is made on first use.
        Raises UsageError: the CSV is missing or not what interactions.py expects.
        """
        if self.name == "demo" and self.data_path is None and not DEMO.exists():
            write_demo(DEMO)
            print(f"made the demo domain: {DEMO}")
        path = find_csv(self.name, self.data_path)

        def zero_is_item() -> bool:  # in someone's own lists it may be padding
            listing = listing_of(path)
            zero, _ = (read_listing(listing) if listing.is_file() else {}).get(0, ("", ""))
            return zero not in ("", "0")

        return read_csv(path, self.ends_are_items, self.split, zero_is_item), path


def split_of(flags: dict) -> str:
    """The split that a run's recorded flags say; older runs do not say it."""
    return flags.get("split") or LEAVE_ONE_OUT


def canonical_domain(domain_type: str) -> str:
    """The domain's name, and so its folder under output/. Raises UsageError: the name is not one
    path component.
    """
    domain = ALIASES.get(domain_type, domain_type)
    if not domain or domain.startswith(".") or {"/", "\\"} & set(domain):
        raise UsageError(f"--domain_type={domain_type}: must be a plain name such as beauty")
    return domain


def find_csv(domain: str, data_path: str | None = None) -> Path:
    """The domain's CSV: `data_path`, else data/<domain>.csv[.gz|.xz], else in dataset/sequential/.
    Raises UsageError: no such file; the line says where it was looked for and which domains are
    there.
    """
    if data_path is not None:
        path = Path(data_path)
        if not path.exists():
            raise UsageError(f"data file not found: {path} (from --data_path)")
        return path
    names = [domain, *(alias for alias, name in ALIASES.items() if name == domain)]
    paths = [Path(folder) / name for name in names for folder in FOLDERS]
    looked = [path.with_name(path.name + suffix) for path in paths for suffix in SUFFIXES]
    present = [path for path in looked if path.exists()]
    if present:
        if present[1:]:
            others = ", ".join(map(str, present[1:]))
            print(f"reading {present[0]}; not read: {others}")
        return present[0]
    there = [path.name for folder in FOLDERS for path in Path(folder).glob("*.csv*")]
    domains = sorted({name.split(".")[0] for name in there if ".items." not in name})
    raise UsageError(
        f"data file not found: {looked[0]} (from --domain_type {domain});"
        f" looked in {', '.join(FOLDERS)}; available: {', '.join(domains) or 'none'};"
        " --data_path names a file elsewhere"
    )


def cache_folder(given: str, teacher: Path) -> Path | None:
    """Where the outputs of frozen teachers are kept; None runs them in every step.

    Args:
        given: `--teacher_cache`.
        teacher: the teacher's folder; `auto` is beside it.
    Raises:
        UsageError: it is a file.
    """
    if given.lower() == "off":
        return None
    folder = teacher.parent / "teacher_states" if given.lower() == "auto" else Path(given)
    if not given or (folder.exists() and not folder.is_dir()):
        raise UsageError(f"--teacher_cache={given}: expected a folder, auto or off")
    return folder
