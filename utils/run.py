"""A run: the folder of one stage, and the rules of starting, resuming, evaluating and reading it.

`Run.open` looks at the folder before any work and refuses what does not fit; `begin` locks it and
writes config.json; `finish` evaluates and writes results.json and ranks.npz. `Run.read` is for a
later stage, which never writes there.
"""

import dataclasses
import importlib.metadata
import json
import platform
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from utils import cpu, files, processes
from utils.errors import UsageError
from utils.files import read_json, write_json
from utils.flags import Group
from utils.metrics_log import CLOCK, MetricsLog

if TYPE_CHECKING:
    from torch import nn

    from utils.evaluation import Ranks
    from utils.training import Fitted

OWN_FILES = ("config.json", "metrics.jsonl", "results.json", "ranks.npz", CLOCK)
OWN_FOLDERS = ("best", "last", "tensorboard", ".old-best", ".old-last")
LIBRARIES = ("torch", "transformers", "peft", "numpy", "safetensors", "fire")
STAGES = {"sasrec": "train_sr_trad.py", "teacher": "finetune.py", "student": "distill.py"}
REBUILD = (  # what to do after the data has changed
    "run every step again in order: train_sr_trad.py --overwrite, extract_emb.py, then the others"
    " with --overwrite"
)
STUDENT_STREAM = 0x5EED_0F_57D  # between a student's draws and those of a teacher of equal --seed
G = TypeVar("G", bound=Group)


class Run:
    """The folder of one stage.

    Attributes:
        stage: which stage: sasrec, teacher or student.
        folder: where it is.
        config: the content of config.json; None if the file is missing.
        flags: flag name -> value, from the command that opened the run, or from config.json for
            `Run.read`.
        eval_only, overwrite: the flags of that name.
        resume: whether an unfinished run is resumed; set by `prepare`.
        source: the run of `--init_from`, whose best weights are this one's start; None without.
    """

    def __init__(
        self, stage: str, folder: Path, config: dict[str, Any] | None, groups: tuple
    ) -> None:
        self.stage, self.folder, self.config, self.groups = stage, folder, config, groups
        self.flags = {name: value for group in groups for name, value in group.values().items()}
        if not groups:
            self.flags = dict((config or {}).get("flags", {}))
        self.eval_only = bool(groups) and self.flags["eval_only"]
        self.overwrite = bool(groups) and self.flags["overwrite"]
        self.resume = False
        self.source: Run | None = None
        self.log = MetricsLog(folder, self.flags.get("tensorboard", False))
        self._new_config: dict[str, Any] = {}

    # -- looking ------------------------------------------------------------------------------

    @classmethod
    def open(cls, stage: str, folder: Path, *groups: Group) -> "Run":
        """Look at `folder` for a command with these flags, before any work.

        A finished or unfinished run of the same flags passes; `is_finished` and `prepare` say later
        whether its files are the same too.

        Raises:
            UsageError: the folder cannot be written, is locked, or holds another run; what differs
                is named.
        """
        files.check_writable(folder, "--output_dir")
        if processes.is_first():
            _refuse_locked(folder)
        try:
            there = (folder / "config.json").exists()
            config = read_json(folder / "config.json", "run") if there else None
        except UsageError as error:  # the folder may be someone else's
            raise UsageError(
                f"--output_dir: {error}; choose another folder, or remove this one"
            ) from None
        run = cls(stage, folder, config, groups)
        run._refuse_foreign()
        if run.flags.get("init_from") and not run.eval_only:
            run.source = cls._open_source(stage, Path(run.flags["init_from"]), folder)
        if run.eval_only:
            if not (folder / "best").is_dir() and not (folder / ".old-best").is_dir():
                raise UsageError(
                    f"--eval_only: no checkpoint {folder / 'best'}; train first, or name the run"
                    " with --output_dir"
                )
        elif config is not None and not run.overwrite:
            run._refuse_other_flags()
        return run

    @classmethod
    def _open_source(cls, stage: str, source: Path, folder: Path) -> "Run":
        if source.resolve() == folder.resolve():
            raise UsageError(f"--init_from={source} is this run's own folder; name --output_dir")
        run = cls.read(stage, source, "--init_from")
        if run.weights_sha256() is None or not (source / "best").is_dir():
            raise UsageError(f"--init_from={source}: has no checkpoint best/")
        return run

    @classmethod
    def read(cls, stage: str, folder: Path, flag: str) -> "Run":
        """The run of an earlier stage, in the folder that `flag` names.

        Raises:
            UsageError: there is no config.json, it is damaged, or it is of another stage.
        """
        if not (folder / "config.json").is_file():
            raise UsageError(f"{flag}={folder}: no {stage} run there; {STAGES[stage]} makes one")
        config = read_json(folder / "config.json", stage)
        found = config.get("step")
        if found != stage:
            raise UsageError(f"{flag}={folder} holds a {found} run, expected a {stage} run")
        return cls(stage, folder, config, ())

    @property
    def seed(self) -> int:
        """The seed of this stage's draws: new weights, sample order, dropout.

        A student draws from another stream than its teacher, whatever `--seed` of either. A run
        that predates this rule resumes with its own draws.
        """
        seed = self.flags["seed"]
        shared = self.stage != "student" or self.older
        return seed if shared else (seed + STUDENT_STREAM) % 2**63

    @property
    def starts_from(self) -> "Run | None":
        """`source` if its weights must still be loaded; None when resuming."""
        return None if self.resume else self.source

    @property
    def threads(self) -> int | None:
        """The number of CPU threads of the run in the folder, or None without a run. Results depend
        on it in their last digits.
        """
        return None if self.overwrite else (self.config or {}).get("threads")

    @property
    def older(self) -> bool:
        """Whether the resumed run predates separate random streams and training plans."""
        return self.resume and "draws" not in self.config

    @property
    def finished(self) -> bool:
        """Whether training is complete. Evaluating an unfinished run does not finish it."""
        path = self.folder / "results.json"
        return path.is_file() and read_json(path, "results").get("steps") is not None

    def results(self) -> dict[str, Any]:
        return read_json(self.folder / "results.json", "results")

    def recorded(self, *groups: G) -> tuple[G, ...]:
        """The groups with the flags that the run was trained with, for `--eval_only`.

        A flag added after the run keeps its default.

        Raises:
            UsageError: a flag was given that contradicts the run; both values are named.
        """
        fixed = (self.config or {}).get("flags")
        if not isinstance(fixed, dict):
            path = self.folder / "config.json"
            raise UsageError(f"{path}: has no flags; it was written by something else")
        agreed = tuple(agree(group, fixed, f"the run in {self.folder}") for group in groups)
        self.flags |= {name: value for group in agreed for name, value in group.values().items()}
        return agreed

    def settled(self, group: G, **defaults: Any) -> G:
        """The group with its empty flags filled from the run in the folder, else by `defaults`."""
        there = {} if self.config is None or self.overwrite else self.config.get("flags", {})
        empty = {name: v for name, v in defaults.items() if getattr(group, name) is None}
        values = {name: there.get(name, value) for name, value in empty.items()}
        self.flags |= values
        return dataclasses.replace(group, **values)

    def precision(self, given: bool | None, on_cuda: bool) -> bool:
        """Whether the model computes in bfloat16: by the flag, on CUDA by default, as recorded with
        `--eval_only`.

        Raises:
            UsageError: the flag contradicts the run that is evaluated.
        """
        if not self.eval_only:
            if given and not on_cuda:
                cpu.report_slow_bfloat16()
            return on_cuda if given is None else given
        recorded = self.config.get("bf16", on_cuda)
        if given is not None and given != recorded:
            raise UsageError(
                f"--bf16={given} contradicts the run in {self.folder}, which has {recorded}"
            )
        return recorded

    def check_same(self, hashes: dict[str, str], *sources: str | Path) -> None:
        """Refuse other input files than the run was made from.

        Args:
            hashes: field of config.json (such as data_sha256) -> the present file's hash.
            sources: where these files are, in the same order.
        """
        for (field, value), source in zip(hashes.items(), sources, strict=True):
            recorded = (self.config or {}).get(field)
            if recorded != value:
                raise UsageError(
                    f"{self.folder} was made from another file: its {field} is"
                    f" {str(recorded)[:12]}..., {source} has {value[:12]}...; where the data has"
                    f" changed, {REBUILD}"
                )

    def weights_sha256(self) -> str | None:
        """Hash of the best checkpoint's weights; from results.json where the checkpoint was taken
        away.
        """
        from utils import checkpoint

        found = checkpoint.weights_sha256(self.folder / "best")
        if found or not (self.folder / "results.json").is_file():
            return found
        return self.results().get("weights_sha256")

    def report_unfinished(self) -> None:
        """Report that a later stage reads an unfinished run."""
        if not self.finished:
            print(
                f"the {self.stage} run in {self.folder} is unfinished:"
                " its best checkpoint so far is read",
                flush=True,
            )

    def is_finished(self, hashes: dict[str, str | None]) -> bool:
        """Whether the folder holds this command's finished run, made from the same files; prints
        its results then.

        Args:
            hashes: field of config.json -> the present file's hash.
        Raises:
            UsageError: it holds a finished run made from other files.
        """
        if self.overwrite or self.eval_only or not self.finished:
            return False
        hashes = hashes | self._start()
        for field, value in hashes.items():
            recorded = self.config.get(field)
            if recorded != value:
                raise UsageError(
                    f"--output_dir={self.folder} holds a finished run from another file:"
                    f" its {field} is {_short(recorded)}, now it is {_short(value)};"
                    " choose another folder, or --overwrite starts from scratch"
                )
        print(f"{self.folder} holds this command's finished run", flush=True)
        print_results(self.results(), self.folder)
        return True

    def _refuse_foreign(self) -> None:
        if self.config is None:
            present = [name for name in (*OWN_FILES, *OWN_FOLDERS) if (self.folder / name).exists()]
            if present:
                raise UsageError(
                    f"--output_dir={self.folder} holds {', '.join(present)} but no run's"
                    " config.json: not a run's folder, choose another"
                )
        elif self.config.get("step") != self.stage:
            raise UsageError(
                f"--output_dir={self.folder} holds a {self.config.get('step')} run,"
                f" not a {self.stage} run; choose another folder"
            )

    def _refuse_other_flags(self) -> None:
        other = self._differences(inherited=True)
        if not other:
            return
        if self.finished:
            raise UsageError(
                f"--output_dir={self.folder} holds a finished run with other flags: {other};"
                " choose another folder, or --overwrite starts from scratch"
            )
        if self._has_checkpoint():
            raise UsageError(
                f"--output_dir={self.folder} holds an unfinished run with other flags: {other};"
                " give its flags to resume it, or --overwrite starts from scratch"
            )

    def _has_checkpoint(self) -> bool:
        """A folder with config.json alone holds no work yet."""
        return any(
            (self.folder / name).exists() for name in ("best", "last", ".old-best", ".old-last")
        )

    def _differences(self, inherited: bool) -> str:
        """A message with the flags that differ from the recorded ones; empty if none differs.

        Args:
            inherited: a flag that is None may still be inherited, so it does not count.
        """
        recorded = self.config.get("flags", {})
        shown = []
        for name, value in self._compared().items():
            if name not in recorded or (value is None and inherited):
                continue
            if value != recorded[name]:
                shown.append(f"--{name}={value} (the run has {recorded[name]})")
        fixed, recorded_fixed = self._fixed(), self.config.get("given")
        if recorded_fixed is not None:  # an older run does not record it
            for name in sorted({*fixed} ^ {*recorded_fixed}):
                here, there = ("given", "adapted") if name in fixed else ("adapted", "given")
                how = f"{here} here, but {there} in the run"
                shown.append(f"--{name}={self.flags[name]} is {how}")
        return ", ".join(shown)

    def _fixed(self) -> list[str]:
        """The flags that were given and would else adapt to the amount of training."""
        return [name for group in self.groups if group.kind == "training" for name in group.fixed()]

    def _compared(self, kinds: tuple[str, ...] = ("model", "training")) -> dict[str, Any]:
        """The flags that must be the same when a run is resumed."""
        names = [name for group in self.groups if group.kind in kinds for name in group.values()]
        return {name: self.flags[name] for name in names}

    # -- training -----------------------------------------------------------------------------

    def prepare(self, **config: Any) -> None:
        """Compare with the unfinished run in the folder, and set `resume`.

        Args:
            config: what config.json will say beside the stage and the flags.
        Raises:
            UsageError: an unfinished run was made from other files, or is of another model; what
                differs is named.
        """
        self._new_config = {"step": self.stage, "draws": 1} | config
        self._new_config |= {"flags": self.flags, "given": self._fixed()} | self._start()
        self.resume = not self.overwrite and self._resumable()
        if self.config is not None and not (self.overwrite or self.resume):
            print(
                f"{self.folder} holds an unfinished run without a checkpoint: starting from scratch"
            )

    def _start(self) -> dict[str, str | None]:
        """What config.json says of the weights that the run starts from."""
        return {"init_sha256": self.source.weights_sha256() if self.source else None}

    def _resumable(self) -> bool:
        """Whether the folder holds work to resume. config.json alone is none."""
        return (
            (self.folder / "config.json").exists() and self._has_checkpoint() and self._continues()
        )

    def _continues(self) -> bool:
        self.config = read_json(self.folder / "config.json", "run")
        plain = json.loads(json.dumps(self._new_config))
        other = []
        for name, value in plain.items():
            if name in ("flags", "given", "teacher") or name not in self.config:
                continue  # paths, and entries added after the run
            recorded = self.config[name]
            if recorded != value:
                other.append(f"{name} is {_short(value)} (the run has {_short(recorded)})")
        flags = self._differences(inherited=False)
        other += [flags] if flags else []
        if other:
            raise UsageError(
                f"--output_dir={self.folder} holds an unfinished run from something else:"
                f" {'; '.join(other)}; --overwrite starts from scratch"
            )
        return True

    def begin(self) -> None:
        """Take the folder: lock it, remove what an earlier run left (its own files only), write
        config.json.

        A resumed run keeps everything but half-written checkpoints. The first process does it for
        all.

        Raises:
            UsageError: another process works in the folder, or did since `open`.
        """
        from utils import checkpoint

        processes.barrier()  # every process has looked at the folder before it changes
        if processes.is_first():
            self.folder.mkdir(parents=True, exist_ok=True)
            self._take_lock()
            for partial in self.folder.glob(".tmp-*"):
                _remove(partial)
            checkpoint.remove_replaced(self.folder)
            if self.resume:
                self._report_changes()
            else:
                for name in (*OWN_FILES, *OWN_FOLDERS):
                    _remove(self.folder / name)
                write_json(self.folder / "config.json", self._new_config | environment())
        processes.barrier()

    def _take_lock(self) -> None:
        while not files.take_lock(self.folder):
            _refuse_locked(self.folder)
        changed = self.finished or self._resumable() != self.resume
        if changed and not self.overwrite:
            files.release_lock(self.folder)
            raise UsageError(
                f"--output_dir={self.folder}: another process changed it in the meantime;"
                " run the command again"
            )

    def _report_changes(self) -> None:
        """Say what differs between this command and the run that it resumes."""
        recorded = self.config.get("flags", {})
        changed = []
        for name, value in self._compared(("free",)).items():
            if name not in ("eval_only", "overwrite") and recorded.get(name, value) != value:
                changed.append(f"--{name}={value} (was {recorded[name]})")
        if changed:
            print(f"resuming with {', '.join(changed)}: speed and rounding may change", flush=True)
        threads = _threads()
        if self.config.get("threads", threads) != threads:
            print(f"resuming with {threads} threads, not {self.config['threads']}: not bit for bit")
        before, now = self.config.get("versions", {}), _versions()
        newer = [name for name in now if before.get(name) != now[name]]
        other = [f"{name} {before.get(name)} -> {now[name]}" for name in newer]
        if other:
            print(
                f"resuming with other library versions, so not bit for bit: {', '.join(other)}",
                flush=True,
            )

    def finish(
        self,
        module: "nn.Module",
        ranks_of: Callable[[str], "Ranks"],
        users: list[str],
        fitted: "Fitted | None" = None,
        seconds: dict[str, float | None] | None = None,
        **extra: Any,
    ) -> dict[str, Any]:
        """Evaluate the model of best/ on valid and test, write results.json and ranks.npz, print
        the test metrics.

        Args:
            module: the model, for its size.
            ranks_of: split name -> ranks of all its users.
            users: their names, in the order of the ranks.
            fitted: what `fit` returned; None where the run is only evaluated.
            seconds: what else the run waited for, by its name in results.json.
            extra: more entries of results.json.
        """
        valid = ranks_of("valid")
        started = time.perf_counter()
        test = ranks_of("test")
        inference = time.perf_counter() - started
        results = self._head(module, fitted, seconds or {}) | extra
        results |= {
            "users": len(test.sampled),
            "valid": valid.metrics(),
            "test": test.metrics(),
            "inference_seconds": round(inference, 3),
            "inference_users_per_second": round(len(test.sampled) / inference, 1),
        }
        if processes.is_first():
            self._write_results(results, {"valid": valid, "test": test}, users)
        processes.barrier()  # no process leaves while another may still wait for its part
        print_results(results, self.folder, "wrote")
        return results

    def _head(self, module: "nn.Module", fitted: "Fitted | None", seconds: dict) -> dict[str, Any]:
        """The run, its size and its training. An evaluation keeps the recorded training."""
        from utils import checkpoint

        config = read_json(self.folder / "config.json", "run")
        sizes = {parameter: parameter.numel() for parameter in module.parameters()}
        head = {
            "step": self.stage,
            "domain": config["domain"],
            "seed": config["flags"]["seed"],
            "data_sha256": config["data_sha256"],
            "random_base": config.get("random_base", False),
            "parameters": sum(sizes.values()),
            "weights_sha256": checkpoint.weights_sha256(self.folder / "best"),
            "trainable_parameters": sum(n for p, n in sizes.items() if p.requires_grad),
        }
        if fitted is None:
            earlier = self.results() if (self.folder / "results.json").exists() else {}
            names = ("steps", "best_step", "train_seconds", *seconds)
            return head | {name: earlier.get(name) for name in names}
        seconds = {"train_seconds": fitted.seconds} | seconds
        rounded = {name: value and round(value, 3) for name, value in seconds.items()}
        return head | {"steps": fitted.steps, "best_step": fitted.best_step} | rounded

    def _write_results(
        self, results: dict[str, Any], ranks: dict[str, "Ranks"], users: list[str]
    ) -> None:
        arrays = {"reviewerID": np.array(users)}
        for split, found in ranks.items():
            for protocol, values in found._asdict().items():
                arrays[f"{split}_{protocol}"] = values.astype(np.int32)
        with files.replacing(self.folder / "ranks.npz") as partial, open(partial, "wb") as file:
            np.savez_compressed(file, **arrays)
        write_json(self.folder / "results.json", results)  # a run that was trained is finished now
        if results["steps"] is not None:
            (self.folder / CLOCK).unlink(missing_ok=True)
        files.release_lock(self.folder)


def agree(group: G, fixed: dict[str, Any], source: str) -> G:
    """`group` with the values that an earlier stage fixed.

    A flag that was given must equal its fixed value.

    Args:
        fixed: flag name -> value. Flags of the group that are not in it stay.
        source: the earlier stage, for messages.
    Raises:
        UsageError: a flag contradicts the earlier stage; both values are named.
    """
    values = {name: fixed[name] for name in group.values() if name in fixed}
    problems = []
    for name, value in values.items():
        given = getattr(group, name)
        if name in group.given and given not in (None, value):
            problems.append(f"--{name}={given} contradicts {source}, which has {value}")
    if problems:
        raise UsageError("; ".join(problems))
    empty = [name for name in values if getattr(group, name) is None]
    inherited = [f"{name} {values[name]}" for name in empty]
    if inherited:
        print(f"inherited from {source}: {', '.join(inherited)}", flush=True)
    return dataclasses.replace(group, **values)


def print_results(results: dict[str, Any], folder: Path, verb: str = "see") -> None:
    """The test metrics of a run, a line per protocol."""
    for protocol, metrics in results["test"].items():
        shown = "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())
        print(f"test {protocol:8s} {shown}", flush=True)
    if results["test"]["sampled"]["HR@1"] == 1.0:
        print("every target ranks first: does the history give the target away?", flush=True)
    print(f"{verb} {folder / 'results.json'}", flush=True)


def environment() -> dict[str, Any]:
    """Library versions, Python, platform and the commit of the code."""
    here = Path(__file__).parent
    command = ["git", "-C", here, "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        commit = done.stdout.strip()
    except OSError:  # a container without git
        commit = ""
    return {
        "versions": _versions(),
        "platform": platform.platform(),
        "commit": commit or None,
        "threads": _threads(),
    }


def _threads() -> int:
    import torch

    return torch.get_num_threads()


def _versions() -> dict[str, str]:
    versions = {name: importlib.metadata.version(name) for name in LIBRARIES}
    return versions | {"python": platform.python_version()}


def _refuse_locked(folder: Path) -> None:
    """Raise UsageError where another process holds the folder."""
    owner = files.lock_owner(folder)
    if owner is not None:
        raise UsageError(
            f"--output_dir={folder}: process {owner} is at work in it; wait,"
            " or choose another folder"
        )


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
