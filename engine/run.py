"""A run of one stage, and the rules of starting, resuming and reading it.

`Run.open` is the one place that compares a command with what its folder holds: flags, input files,
earlier runs. `prepare` adds the model, `training` locks the folder and writes config.json,
`complete` writes results.json. `Run.read` is for a later stage, which never writes there.
"""

import dataclasses
import importlib.metadata
import json
import platform
import subprocess
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from engine import checkpoint, cpu, files, processes
from engine.cli import Group
from engine.errors import RunError, UsageError
from engine.files import read_json, write_json
from engine.folder import (
    await_put_back,
    clean,
    has_checkpoint,
    hold,
    is_finished,
    put_back,
    refuse_foreign,
    refuse_locked,
    set_aside,
    take,
)
from engine.log import CLOCK, MetricsLog

if TYPE_CHECKING:
    import torch

LIBRARIES = ("torch", "transformers", "peft", "numpy", "safetensors", "fire")
# entries of config.json that may differ when a run resumes
PATHS = ("base", "teacher", "cached")
G = TypeVar("G", bound=Group)


class Run:
    """The folder of one stage.

    Attributes:
        stage: the stage's name, `step` in config.json.
        folder: where it is.
        config: the content of config.json; None if the file is missing.
        groups: the flag groups, settled: with `eval_only` they have the run's values.
        flags: flag name -> value of these groups, or as recorded where the run is only read.
        eval_only, overwrite: the flags of that name.
        finished: whether training is complete (folder.is_finished); never with `overwrite`.
        device, bf16: where and in what precision it computes; set by `choose_device`.
        resume: whether an unfinished run is resumed; set by `prepare`.
        source: the run of `--init_from`, whose best weights are this one's start; None without,
            and when resuming.
    """

    def __init__(
        self, stage: str, folder: Path, config: dict[str, Any] | None, groups: Iterable[Group] = ()
    ) -> None:
        self.stage, self.folder, self.config, self.groups = stage, folder, config, [*groups]
        usual = {name: value for group in self.groups for name, value in group.usual.items()}
        self.recorded = recorded_flags(config or {}, usual)
        for group in self.groups if self.recorded else ():  # a flag that it lacks had its default
            defaults = type(group)().values()
            for name, value in group.values().items():
                self.recorded.setdefault(name, defaults[name] if name in group.given else value)
        self.flags = dict(self.recorded)
        if self.groups:
            self.flags = {name: v for group in self.groups for name, v in group.values().items()}
        self.eval_only = bool(self.groups) and self.flags["eval_only"]
        self.overwrite = bool(self.groups) and self.flags["overwrite"]
        self.finished = is_finished(folder) and not self.overwrite
        self.resume, self.source = False, None
        self.device, self.bf16 = None, bool((config or {}).get("bf16"))
        self.log = MetricsLog(folder, self.flags.get("tensorboard", False))
        self._new_config: dict[str, Any] = {}
        self._kept: dict[str, Path] = {}
        self._evaluated: str | None = None  # hash of the weights

    # -- looking ------------------------------------------------------------------------------

    @classmethod
    def open(
        cls,
        stage: str,
        folder: Path,
        groups: Iterable[Group],
        inputs: Any,
        earlier: dict[str, list["Run"]] | None = None,
    ) -> "Run":
        """Look at `folder` for a command with these flags and files, before any work.

        Args:
            groups: all flag groups of the command.
            inputs: its files (datasets.inputs.Inputs).
            earlier: stage -> the runs of that stage that this one reads, for every stage that it
                can read.
        Raises:
            UsageError: the folder cannot be written, is locked, or holds another run; an earlier
                run was made from other files. What differs is named.
        """
        if processes.is_first():
            refuse_locked(folder)
            put_back(folder)  # of a start that died before its checkpoint
        else:
            await_put_back(folder)
        try:
            there = (folder / "config.json").exists()
            config = read_json(folder / "config.json", "run") if there else None
        except UsageError as error:  # the folder may be someone else's
            raise UsageError(
                f"--output_dir: {error}; choose another folder, or remove this one"
            ) from None
        run = cls(stage, folder, config, groups)
        if run.eval_only or not run.finished:
            files.check_writable(folder, "--output_dir")
        refuse_foreign(folder, stage, config)
        earlier = earlier or {}
        for name, runs in earlier.items():
            for other in runs:
                other.check_same(inputs)
                other.report_unfinished(f"--{name}")
        if run.eval_only:
            run._take_recorded(inputs)
            return run
        if run.flags.get("init_from"):
            run.source = cls._open_source(stage, Path(run.flags["init_from"]), folder, inputs)
        hashes = inputs.hashes | {"init_sha256": run.source and run.source.weights_sha256()}
        for name, runs in earlier.items():
            known = [other.weights_sha256() for other in runs]
            hashes[f"{name}_sha256"] = ",".join(map(str, known)) or None
        run._new_config, run._kept = hashes, inputs.kept
        if config is not None and (run.finished or has_checkpoint(folder)) and not run.overwrite:
            run._refuse_others(hashes)
        return run

    @classmethod
    def _open_source(cls, stage: str, source: Path, folder: Path, inputs: Any) -> "Run":
        if source.resolve() == folder.resolve():
            raise UsageError(f"--init_from={source} is this run's own folder; name --output_dir")
        run = cls.read(stage, source, "--init_from")
        if run.weights_sha256() is None or not run.has_best:
            raise UsageError(f"--init_from={source}: has no checkpoint best/")
        run.report_unfinished("--init_from")
        if inputs.weights_have_items:
            run.check_same(inputs)
        names = inputs.differing(run.config)
        if names:
            print(f"{source} was trained with other files: {', '.join(names)}")
        return run

    @classmethod
    def read(cls, stage: str, folder: Path, flag: str, maker: str = "") -> "Run":
        """The run of an earlier stage, in the folder that `flag` names.

        Args:
            maker: the command that makes such a run, for the message.
        Raises:
            UsageError: there is no config.json, it is damaged, or it is of another stage.
        """
        if not (folder / "config.json").is_file():
            makes = f"; {maker} makes one" if maker else ""
            raise UsageError(f"{flag}={folder}: no {stage} run there{makes}")
        config = read_json(folder / "config.json", stage)
        found = config.get("step")
        if found != stage:
            raise UsageError(f"{flag}={folder} holds a {found} run, expected a {stage} run")
        return cls(stage, folder, config)

    @property
    def seed(self) -> int:
        """The seed of this stage's draws: new weights, sample order, dropout. Stages may draw from
        streams of their own, whatever `--seed`.
        """
        return (self.flags["seed"] + sum(group.stream for group in self.groups)) % 2**63

    @property
    def has_best(self) -> bool:
        """Whether there is a checkpoint best/, or the old one of a run that died replacing it."""
        return (self.folder / "best").is_dir() or (self.folder / ".old-best").is_dir()

    def results(self) -> dict[str, Any]:
        return read_json(self.folder / "results.json", "results")

    def print_results(self) -> dict[str, Any]:
        """Print what a finished run reached, and return it."""
        print(f"{self.folder} holds this command's finished run")
        return self._show(self.results(), "see")

    def _show(self, results: dict[str, Any], verb: str) -> dict[str, Any]:
        """Print the test metrics, a line per protocol."""
        for protocol, metrics in results["test"].items():
            shown = "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())
            print(f"test {protocol:8s} {shown}")
        print(f"{verb} {self.folder / 'results.json'}")
        return results

    def weights_sha256(self) -> str | None:
        """Hash of the best checkpoint's weights; from results.json where that was taken away."""
        found = checkpoint.weights_sha256(self.folder / "best")
        if found or not (self.folder / "results.json").is_file():
            return found
        return self.results().get("weights_sha256")

    def check_same(self, inputs: Any) -> None:
        """Refuse other input files than this run was made from."""
        inputs.check(self.config or {}, self.folder)

    def report_unfinished(self, flag: str = "") -> None:
        """Report that a later stage reads an unfinished run.

        Args:
            flag: what names it where it must not change meanwhile.
        Raises:
            UsageError: it has no checkpoint best/ yet; or, with `flag`, a process works in it.
        """
        if flag and processes.is_first():
            refuse_locked(self.folder, flag)
        if not (self.finished or self.has_best):
            raise UsageError(
                f"the {self.stage} run in {self.folder} stopped before its first evaluation;"
                " run its command again to finish it"
            )
        if not self.finished:
            print(
                f"the {self.stage} run in {self.folder} is unfinished:"
                " its best checkpoint so far is read"
            )

    def fix(self, group: G, values: dict[str, Any] | None = None) -> G:
        """`group` with the values that this run fixed, which are printed where the flag was empty.

        Args:
            values: flag name -> value; the run's flags by default. Flags of the group that are not
                in it stay.
        Raises:
            UsageError: a flag was given that contradicts the run; both values are named.
        """
        fixed = self.recorded if values is None else values
        fixed = {name: fixed[name] for name in group.values() if name in fixed}
        source = f"the {self.stage} run in {self.folder}"
        problems = []
        for name, value in fixed.items():
            given = getattr(group, name)
            if name in group.given and given not in (None, value):
                problems.append(f"--{name}={given} contradicts {source}, which has {value}")
        if problems:
            raise UsageError("; ".join(problems))
        said = {n: v for n, v in fixed.items() if v is not None and getattr(group, n) is None}
        inherited = [f"{name} {value}" for name, value in said.items()]
        if inherited:
            print(f"inherited from {source}: {', '.join(inherited)}")
        return dataclasses.replace(group, **fixed)

    def _take_recorded(self, inputs: Any) -> None:
        """With `--eval_only`: flags are the run's, and files must be."""
        if not self.has_best:
            raise UsageError(
                f"--eval_only: no checkpoint {self.folder / 'best'}; train first, or name the run"
                " with --output_dir"
            )
        if not isinstance((self.config or {}).get("flags"), dict):
            path = self.folder / "config.json"
            raise UsageError(f"{path}: has no flags; it was written by something else")
        recorded = {n: v for n, v in self.recorded.items() if n != "bf16"}  # see choose_device
        for i, group in enumerate(self.groups):
            if group.kind in ("model", "training"):
                self.groups[i] = self.fix(group, recorded)
        for group in self.groups:
            self.flags |= group.values()
        self.check_same(inputs)
        self.report_unfinished()
        self._evaluated = self.weights_sha256()

    def _refuse_others(self, content: dict[str, Any]) -> None:
        """Refuse a folder whose run has other flags, or other entries of config.json."""
        state = "a finished" if self.finished else "an unfinished"
        mend = "choose another folder" if self.finished else "give its flags to resume it"
        flags = self._other_flags("model", "training")
        if flags:
            raise UsageError(
                f"--output_dir={self.folder} holds {state} run with other flags: {flags};"
                f" {mend}, or --overwrite starts from scratch"
            )
        other = []
        for name, value in json.loads(json.dumps(content)).items():
            recorded = self.config.get(name, value)  # it may have been added after the run
            if recorded != value and name not in PATHS:
                other.append(f"{name} is {_short(value)} (the run has {_short(recorded)})")
        if other:
            raise UsageError(
                f"--output_dir={self.folder} holds {state} run from something else:"
                f" {'; '.join(other)}; choose another folder, or --overwrite starts from scratch"
            )

    def _other_flags(
        self, *kinds: str, had: str = "the run has", lacked: str = "not in the run"
    ) -> str:
        """The flags of these kinds that differ from the recorded ones."""
        shown = []
        for group in self.groups:
            for name, value in group.values().items() if group.kind in kinds else ():
                recorded = self.recorded[name]
                if name == "bf16" and (value is not None or not self.finished):
                    # empty, it adapts to the device: `prepare` compares then
                    recorded = self.config.get("bf16", recorded)
                    value = recorded if value is None else value
                if recorded != value:
                    given = f"no --{name}" if value is None else f"--{name}={value}"
                    shown.append(f"{given} ({lacked if recorded is None else f'{had} {recorded}'})")
        return ", ".join(shown)

    # -- computing ----------------------------------------------------------------------------

    def choose_device(self) -> "torch.device":
        """The device. Sets `bf16`, whether to compute in bfloat16: by the flag, on CUDA by default,
        as recorded with `--eval_only`. The number of CPU threads is that of the run in the folder.
        Raises UsageError: there is no such device, or the flag contradicts the run that is
        evaluated.
        """
        before = {} if self.overwrite else self.config or {}
        device = processes.choose_device(self.flags["device"], before.get("threads"))
        given, on_cuda = self.flags["bf16"], device.type == "cuda"
        self.device, self.bf16 = device, on_cuda if given is None else given
        if not self.eval_only:
            if not on_cuda and given is not False:
                cpu.report_bfloat16(self.bf16, "compile" in self.flags)
            return device
        self.bf16 = self.config.get("bf16", on_cuda)
        written = any("bf16" in group.given for group in self.groups)
        if written and given not in (None, self.bf16):
            raise UsageError(
                f"--bf16={given} contradicts the run in {self.folder}, which has {self.bf16}"
            )
        return device

    def prepare(self, **config: Any) -> None:
        """Compare the model with that of the unfinished run in the folder, and set `resume`.

        Args:
            config: what config.json will say beside the stage, the flags and the hashes.
        Raises:
            UsageError: an unfinished run is of another model; what differs is named.
        """
        config["bf16"] = self.bf16
        self._new_config = {"step": self.stage} | config | self._new_config
        self._new_config["flags"] = self.flags
        self.resume = not self.overwrite and self.config is not None and has_checkpoint(self.folder)
        if self.resume:
            self._refuse_others(config)
            self.source = None
        elif self.source is not None:
            print(f"starting from the best weights of {self.source.folder}")
        elif self.config is not None and not self.overwrite:
            print(
                f"{self.folder} holds an unfinished run without a checkpoint: starting from scratch"
            )

    @contextmanager
    def training(self) -> Iterator[None]:
        """Take the folder for the block that trains. A block that ends by an error, without a
        checkpoint, puts back the run that was to be replaced. Raises UsageError: another process
        works in the folder, or did since `open`.
        """
        processes.barrier()  # every process has looked at the folder before it changes
        if processes.is_first():
            take(self.folder, self.overwrite, self.resume)
        try:
            self._begin()
            yield
        except BaseException as error:
            back = processes.is_first() and put_back(self.folder)
            if back and isinstance(error, RunError):
                raise RunError(f"{error}; the run that was there is back") from None
            raise

    def _begin(self) -> None:
        """Remove what an earlier run left (its own files only), write config.json.

        A resumed run keeps everything but half-written checkpoints. The first process does it for
        all.
        """
        if processes.is_first():
            clean(self.folder)
            if self.resume:
                self._report_changes()
            else:
                name = processes.device_name(self.device) if self.device is not None else None
                about = environment() | {"device": name}
                set_aside(self.folder)
                write_json(self.folder / "config.json", self._new_config | about)
                for name, source in self._kept.items():
                    files.copy(source, self.folder / name)
        processes.barrier()
        self.config = read_json(self.folder / "config.json", "run")

    def _report_changes(self) -> None:
        """Say what differs between this command and the run that it resumes."""
        changed = self._other_flags("free", had="was", lacked="was not given")
        if changed:
            print(f"resuming with {changed}: speed and rounding may change")
        now = environment()
        threads = self.config.get("threads", now["threads"])
        if threads != now["threads"]:
            print(f"resuming with {now['threads']} threads, not {threads}: not bit for bit")
        before, versions = self.config.get("versions", {}), now["versions"]
        other = [f"{n} {before.get(n)} -> {v}" for n, v in versions.items() if before.get(n) != v]
        if other:
            print(f"resuming with other library versions, so not bit for bit: {', '.join(other)}")

    def _refuse_replaced(self) -> None:
        """Take the folder, to write what was evaluated. Raises RunError: best/ is another one."""
        hold(self.folder)
        if self.weights_sha256() != self._evaluated:
            files.release_lock(self.folder)
            raise RunError(f"{self.folder / 'best'} was replaced meanwhile; evaluate it again")

    def complete(self, results: dict[str, Any], arrays: dict[str, np.ndarray]) -> dict[str, Any]:
        """Write results.json and ranks.npz; a run that was trained is finished then. Raises
        RunError: best/ is another one than the one that `--eval_only` found.
        """
        if processes.is_first():
            if self.eval_only:
                self._refuse_replaced()
            path = self.folder / "ranks.npz"
            with files.replacing(path) as partial, open(partial, "wb") as file:
                np.savez_compressed(file, **arrays)
            write_json(self.folder / "results.json", results)
            if results["steps"] is not None:
                (self.folder / CLOCK).unlink(missing_ok=True)
            files.release_lock(self.folder)
        processes.barrier()  # no process leaves while another may still wait for its part
        return self._show(results, "wrote")


def run_names(text: str, flag: str) -> list[str]:
    """The names of runs between commas; a folder's own name may hold commas. Raises UsageError: one
    of several names is empty.
    """
    names = [text] if Path(text).is_dir() else [name.strip() for name in text.split(",")]
    if not all(names):
        raise UsageError(f"--{flag}={text}: an empty name between commas")
    return names


def recorded_flags(config: dict[str, Any], usual: dict[str, Any]) -> dict[str, Any]:
    """The flags of a config.json.

    Before 2026-11-28 an empty flag that adapts had its usual value, and `given` listed the others.
    """
    flags, given = config.get("flags"), config.get("given")
    flags = dict(flags) if isinstance(flags, dict) else {}
    return flags | dict.fromkeys(n for n in usual if given is not None and n not in given)


def environment() -> dict[str, Any]:
    """Library versions, Python, platform, threads and the commit of the code."""
    import torch

    describe = ["describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    command = ["git", "-C", Path(__file__).parent, *describe]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        commit = done.stdout.strip()
    except OSError:  # a container without git
        commit = ""
    versions = {name: importlib.metadata.version(name) for name in LIBRARIES}
    return {
        "versions": versions | {"python": platform.python_version()},
        "platform": platform.platform(),
        "commit": commit or None,
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "threads": torch.get_num_threads(),
    }


def _short(value: Any) -> str:
    """A hash, or a list of layers, in a few characters."""
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else text[:12] + "..."
