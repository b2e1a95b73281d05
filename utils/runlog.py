"""A run's folder: config.json, metrics.jsonl, results.json, ranks.npz, and the rules of taking it over."""

import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

from utils.cli import UsageError

OWN_FILES = ("config.json", "metrics.jsonl", "results.json", "ranks.npz")
OWN_FOLDERS = ("best", "last", "tensorboard", ".old-best", ".old-last")
LIBRARIES = ("torch", "transformers", "peft", "numpy", "safetensors", "fire")


def check_output_dir(folder: str | Path, step: str, *, overwrite: bool, eval_only: bool = False) -> None:
    """Refuse a folder that cannot be written or that holds another run, before any work.

    Raises:
        UsageError: naming the folder and what to do.
    """
    folder = Path(folder)
    for part in (folder, *folder.parents):
        if part.exists():
            if not part.is_dir():
                raise UsageError(f"--output_dir={folder}: {part} is a file, not a folder")
            if not os.access(part, os.W_OK):
                raise UsageError(f"--output_dir={folder}: {part} is not writable")
            break
    if (folder / "config.json").exists():
        held = read_json(folder / "config.json", "run").get("step")
        if held != step:
            raise UsageError(f"--output_dir={folder} holds a {held} run, not a {step} run; choose another folder")
    if eval_only:
        if not (folder / "best").is_dir() and not (folder / ".old-best").is_dir():
            raise UsageError(f"--eval_only: no checkpoint {folder / 'best'}; train first, or name the run with --output_dir")
    elif (folder / "config.json").exists() and not overwrite:
        state = "a finished run" if (folder / "results.json").exists() else "an unfinished run"
        raise UsageError(f"--output_dir={folder} holds {state}; --overwrite starts anew, --eval_only evaluates it")


def start(folder: str | Path, config: dict[str, Any]) -> Path:
    """Clear what an earlier run left in `folder` (its own files only) and write config.json."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name in OWN_FILES:
        (folder / name).unlink(missing_ok=True)
    for name in OWN_FOLDERS:
        shutil.rmtree(folder / name, ignore_errors=True)
    write_json(folder / "config.json", config | environment())
    return folder


def environment() -> dict[str, Any]:
    """Library versions, Python, platform and the commit of the code."""
    here = Path(__file__).parent
    commit = subprocess.run(["git", "-C", here, "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    versions = {name: importlib.metadata.version(name) for name in LIBRARIES}
    return {
        "versions": versions | {"python": platform.python_version()},
        "platform": platform.platform(),
        "commit": commit or None,
    }


def write_json(path: str | Path, content: Any) -> None:
    """Write JSON atomically."""
    path = Path(path)
    partial = path.with_name(f".tmp-{path.name}")
    partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
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


def about(folder: Path, step: str, module: Any, fitted: Any, weights_sha256: str) -> dict[str, Any]:
    """The head of results.json: which run, how large, how it was trained (kept from before where it was only evaluated)."""
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
        trained = {"steps": fitted.steps, "best_step": fitted.best_step, "train_seconds": round(fitted.seconds, 3)}
    else:
        earlier = read_json(folder / "results.json", "results") if (folder / "results.json").exists() else {}
        trained = {name: earlier.get(name) for name in ("steps", "best_step", "train_seconds")}
    return head | trained


class MetricsLog:
    """Appends a JSON line per event to metrics.jsonl and, where asked, numbers to TensorBoard."""

    def __init__(self, folder: str | Path, tensorboard: bool) -> None:
        self.path = Path(folder) / "metrics.jsonl"
        self.writer = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(Path(folder) / "tensorboard"))

    def add(self, event: str, step: int, values: dict[str, Any]) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"event": event, "step": step, **values}) + "\n")
        if self.writer is not None:
            for name, value in values.items():
                if isinstance(value, (int, float)):
                    self.writer.add_scalar(f"{event}/{name}", value, step)
            self.writer.flush()
