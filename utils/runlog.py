"""A run's folder: config.json, results.json, ranks.npz, and the rules of taking it over. metrics_log.py writes metrics.jsonl."""

import fcntl
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any, TextIO

from utils import distributed
from utils.cli import UsageError

OWN_FILES = ("config.json", "metrics.jsonl", "results.json", "ranks.npz", "clock.json")
OWN_FOLDERS = ("best", "last", "tensorboard", ".old-best", ".old-last")
LOCK = ".lock"
PLACES = ("output_dir", "data_path", "item_table", "teacher", "teacher_cache")  # where things are; what they are is hashed
HARMLESS = ("overwrite", "eval_only", "device", "tensorboard", "eval_batch_size")  # change no trained number
LIBRARIES = ("torch", "transformers", "peft", "numpy", "safetensors", "fire")

_locks: dict[Path, TextIO] = {}  # folders that this process holds


def check_output_dir(folder: str | Path, step: str, flags: dict[str, Any], *, overwrite: bool, eval_only: bool = False) -> None:
    """Refuse a folder that cannot be written or that holds another run, before any work.

    An unfinished run of the same flags passes: `unfinished` says later whether its files are the same too.

    Raises:
        UsageError: naming the folder, what differs and what to do.
    """
    folder = Path(folder)
    check_place(folder, "--output_dir")
    _refuse_locked(folder)
    try:
        run = read_json(folder / "config.json", "run") if (folder / "config.json").exists() else None
    except UsageError as error:  # whose files these are is not known
        raise UsageError(f"--output_dir: {error}; choose another folder, or remove this one") from None
    foreign = [name for name in (*OWN_FILES, *OWN_FOLDERS) if run is None and (folder / name).exists()]
    if foreign:
        raise UsageError(f"--output_dir={folder} holds {', '.join(foreign)} but no run's config.json: not a run's folder, choose another")
    if run is not None and run.get("step") != step:
        raise UsageError(f"--output_dir={folder} holds a {run.get('step')} run, not a {step} run; choose another folder")
    if eval_only:
        if not (folder / "best").is_dir() and not (folder / ".old-best").is_dir():
            raise UsageError(f"--eval_only: no checkpoint {folder / 'best'}; train first, or name the run with --output_dir")
    elif run is not None and not overwrite:
        other = differences(run, flags)
        if finished(folder):
            raise UsageError(
                f"--output_dir={folder} holds a finished run{' with other flags: ' + other if other else ''};"
                " --overwrite starts anew, --eval_only evaluates it"
            )
        if other:
            raise UsageError(f"--output_dir={folder} holds an unfinished run with other flags: {other}; give its flags to go on, or --overwrite")


def check_place(folder: str | Path, flag: str) -> None:
    """Refuse a folder that cannot be made or written to.

    Raises:
        UsageError: naming the flag, the folder and the part of its path that is in the way.
    """
    folder = Path(folder)
    for part in (folder, *folder.parents):
        if part.exists():
            if not part.is_dir():
                raise UsageError(f"{flag}={folder}: {part} is a file, not a folder")
            if not os.access(part, os.W_OK):
                raise UsageError(f"{flag}={folder}: {part} is not writable")
            return


def finished(folder: str | Path) -> bool:
    """Whether training in `folder` came to its end; evaluating an unfinished run does not make it one."""
    path = Path(folder) / "results.json"
    return path.is_file() and read_json(path, "results").get("steps") is not None


def differences(run: dict[str, Any], flags: dict[str, Any], inherited: bool = True) -> str:
    """Where flags differ from those of a run's config.json; None stands for what is inherited, unless that is filled in by now."""
    recorded = run.get("flags", {})
    return ", ".join(
        f"--{name}={value} (the run has {recorded[name]})"
        for name, value in flags.items()
        if name not in (*PLACES, *HARMLESS) and (value is not None or not inherited) and name in recorded and recorded[name] != value
    )


def unfinished(folder: str | Path, config: dict[str, Any], overwrite: bool) -> bool:
    """Whether `folder` holds an unfinished run of just this configuration, to go on with.

    Raises:
        UsageError: it holds one made from other files or flags; what differs is named.
    """
    folder = Path(folder)
    if overwrite or not (folder / "config.json").exists():
        return False
    run = read_json(folder / "config.json", "run")
    plain = json.loads(json.dumps(config))
    changed = [name for name in plain if name not in ("flags", "teacher") and run.get(name) != plain[name]]
    other = [f"{name} is {_short(plain[name])} (the run has {_short(run.get(name))})" for name in changed]
    other += [text for text in [differences(run, plain["flags"], inherited=False)] if text]
    if other:
        raise UsageError(f"--output_dir={folder} holds an unfinished run from something else: {'; '.join(other)}; --overwrite starts anew")
    return True


def _short(value: Any) -> str:
    text = json.dumps(value) if not isinstance(value, str) else value
    return text if len(text) <= 60 else text[:57] + "..."


def start(folder: str | Path, config: dict[str, Any], resume: bool, overwrite: bool) -> None:
    """Take the folder: lock it, clear what an earlier run left (its own files only) and write config.json.

    Args:
        resume: keep everything, sweep half-written checkpoints alone. With several processes the first one does it all.
    Raises:
        UsageError: another process is at work in it, or was since it was looked at.
    """
    distributed.barrier()  # every process has looked at the folder before it changes
    folder = Path(folder)
    if distributed.is_first():
        folder.mkdir(parents=True, exist_ok=True)
        _lock(folder)
        if not overwrite and (finished(folder) or unfinished(folder, config, overwrite) != resume):
            unlock(folder)
            raise UsageError(f"--output_dir={folder}: another process was at work in it since this one looked; give the command again")
        for partial in folder.glob(".tmp-*"):
            shutil.rmtree(partial, ignore_errors=True) if partial.is_dir() else partial.unlink(missing_ok=True)
        if not resume:
            for name in OWN_FILES:
                (folder / name).unlink(missing_ok=True)
            for name in OWN_FOLDERS:
                shutil.rmtree(folder / name, ignore_errors=True)
            write_json(folder / "config.json", config | environment())
        else:
            _tell_other_versions(read_json(folder / "config.json", "run").get("versions", {}))
    distributed.barrier()


def _tell_other_versions(before: dict[str, str]) -> None:
    other = [f"{name} {before.get(name)} -> {version}" for name, version in _versions().items() if before.get(name) != version]
    if other:
        print(f"going on with other library versions, so not bit for bit: {', '.join(other)}", flush=True)


def _refuse_locked(folder: Path) -> None:
    path = folder / LOCK
    if not path.exists() or folder.resolve() in _locks:
        return
    with open(path, encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared: those that only look do not keep each other out
        except BlockingIOError:
            raise UsageError(f"--output_dir={folder}: process {file.read().strip() or '?'} is at work in it; wait, or choose another folder") from None


def _lock(folder: Path) -> None:
    """Hold the folder until `unlock` or the process's end; the lock of a dead process is free by itself."""
    if folder.resolve() in _locks:
        return
    while True:
        _refuse_locked(folder)
        file = open(folder / LOCK, "a+", encoding="utf-8")  # noqa: SIM115  held open
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            continue
        if (folder / LOCK).exists() and os.fstat(file.fileno()).st_ino == (folder / LOCK).stat().st_ino:
            break
        file.close()  # its holder removed it in between
    file.truncate(0)
    file.write(f"{os.getpid()} on {platform.node()}\n")
    file.flush()
    _locks[folder.resolve()] = file


def unlock(folder: str | Path) -> None:
    """Give the folder back."""
    file = _locks.pop(Path(folder).resolve(), None)
    if file is not None:
        (Path(folder) / LOCK).unlink(missing_ok=True)
        file.close()


def environment() -> dict[str, Any]:
    """Library versions, Python, platform and the commit of the code."""
    here = Path(__file__).parent
    try:
        commit = subprocess.run(["git", "-C", here, "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    except OSError:  # a container without git
        commit = ""
    return {
        "versions": _versions(),
        "platform": platform.platform(),
        "commit": commit or None,
    }


def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in LIBRARIES} | {"python": platform.python_version()}


def write_json(path: str | Path, content: Any) -> None:
    """Write JSON atomically."""
    path = Path(path)
    partial = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    with open(partial, "w", encoding="utf-8") as file:
        file.write(json.dumps(content, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def file_sha256(path: str | Path) -> str:
    """sha256 of a file, read as a stream."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: str | Path, what: str) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        UsageError: missing or damaged; `what` says which step's file it is.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"{what} not found: {path}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError):
        raise UsageError(f"{path}: damaged, not JSON") from None
    if not isinstance(content, dict):
        raise UsageError(f"{path}: damaged, not a JSON object")
    return content


def inherit(earlier: dict[str, Any], given: dict[str, Any], source: str) -> dict[str, Any]:
    """Values that an earlier step fixed: a flag left at None takes the earlier value, another must equal it.

    Args:
        earlier: the earlier step's config; given: flag -> value or None; source: the earlier step, for messages.
    Raises:
        UsageError: a flag contradicts the earlier step; both values are named.
    """
    problems, values = [], {}
    for name, value in given.items():
        if name not in earlier:
            raise UsageError(f"{source}: its config.json has no {name}; it was written by something else")
        if value is not None and value != earlier[name]:
            problems.append(f"--{name}={value} contradicts {source}, which has {earlier[name]}")
        values[name] = earlier[name]
    if problems:
        raise UsageError("; ".join(problems))
    shown = ", ".join(f"{name} {value}" for name, value in values.items() if not isinstance(value, (list, dict)))
    print(f"inherited from {source}: {shown}", flush=True)
    return values


def tell_unfinished(folder: str | Path, what: str) -> None:
    """Say where a later step reads a run that has not come to its end; its best checkpoint so far is used."""
    if not finished(folder):
        print(f"the {what} in {folder} is unfinished: its best checkpoint so far is read", flush=True)


def recorded_precision(folder: str | Path, given: bool | None, otherwise: bool) -> bool:
    """Whether a run's model computes in bfloat16, so that its metrics come again.

    Raises:
        UsageError: the flag says otherwise.
    """
    run = read_json(Path(folder) / "config.json", "run").get("bf16", otherwise)
    if given is not None and given != run:
        raise UsageError(f"--bf16={given}: the run in {folder} has {run}")
    return run


def without_effect(flags: dict[str, Any], defaults: dict[str, Any], names: tuple[str, ...], why: str) -> None:
    """Say which of the named flags were given and have nothing to act on."""
    given = [f"--{name}={flags[name]}" for name in names if flags[name] != defaults[name]]
    if given:
        print(f"without effect: {', '.join(given)} ({why})", flush=True)


def recorded(folder: str | Path, flags: dict[str, Any], defaults: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """What a run in `folder` was started with, for evaluating it again without repeating its flags.

    Raises:
        UsageError: a flag was changed from its default to something else than the run has; both values are named.
    """
    run = read_json(Path(folder) / "config.json", "run").get("flags", {})
    missing = [name for name in names if name not in run]
    if missing:
        raise UsageError(f"{Path(folder) / 'config.json'}: has no flag {missing[0]}; it was written by something else")
    problems = [
        f"--{name}={flags[name]}: the run in {folder} has {run[name]}" for name in names if flags[name] not in (defaults[name], run[name])
    ]
    if problems:
        raise UsageError("; ".join(problems))
    return {name: run[name] for name in names}


def check_same(folder: str | Path, now: dict[str, str], source: str | Path) -> None:
    """Refuse to go on with other files than the run in `folder` was made from.

    Args:
        now: field of config.json (such as data_sha256) -> the present file's hash; source: where that file is.
    """
    config = read_json(Path(folder) / "config.json", "run")
    for field, value in now.items():
        if config.get(field) != value:
            raise UsageError(
                f"{folder} was made from another file: its {field} is {str(config.get(field))[:12]}..., {source} has {value[:12]}..."
            )


def about(folder: Path, step: str, module: Any, fitted: Any, weights_sha256: str, **times: float | None) -> dict[str, Any]:
    """The head of results.json: which run, how large, how it was trained (kept from before where it was only evaluated).

    Args:
        times: seconds of what else the run waited for, by their names there.
    """
    config = read_json(folder / "config.json", "run")
    sizes = {p: p.numel() for p in module.parameters()}
    head = {
        "step": step,
        "domain": config["domain"],
        "seed": config["flags"]["seed"],
        "data_sha256": config["data_sha256"],
        "random_base": config.get("random_base", False),
        "parameters": sum(sizes.values()),
        "weights_sha256": weights_sha256,
        "trainable_parameters": sum(n for p, n in sizes.items() if p.requires_grad),
    }
    if fitted is not None:
        times = {"train_seconds": fitted.seconds} | times
        trained = {"steps": fitted.steps, "best_step": fitted.best_step} | {name: value and round(value, 3) for name, value in times.items()}
    else:
        earlier = read_json(folder / "results.json", "results") if (folder / "results.json").exists() else {}
        trained = {name: earlier.get(name) for name in ("steps", "best_step", "train_seconds", *times)}
    return head | trained
