"""A run's folder on disk: its own files, whose it is, and what `--overwrite` replaces."""

import shutil
import time
from pathlib import Path

from engine import checkpoint, files
from engine.errors import UsageError
from engine.files import read_json
from engine.log import CLOCK

OWN_FILES = ("config.json", "metrics.jsonl", "results.json", "ranks.npz", "items.csv", CLOCK)
CHECKPOINTS = ("best", "last", ".old-best", ".old-last")
OWN = (*OWN_FILES, *CHECKPOINTS, "tensorboard")
PATIENCE = 300  # tenths of a second; a folder that cannot be put back stays as it is
REPLACED = ".replaced"  # what --overwrite replaces, until the new run has a checkpoint


def is_finished(folder: Path) -> bool:
    """Whether training is complete. Evaluating an unfinished run does not finish it."""
    path = folder / "results.json"
    return path.is_file() and read_json(path, "results").get("steps") is not None


def has_checkpoint(folder: Path) -> bool:
    """A folder with config.json alone holds no work yet."""
    return any((folder / name).exists() for name in CHECKPOINTS)


def refuse_locked(folder: Path, flag: str = "--output_dir") -> None:
    """Raise UsageError where another process holds the folder."""
    owner = files.lock_owner(folder)
    if owner is not None:
        raise UsageError(
            f"{flag}={folder}: process {owner} is at work in it; wait, or choose another folder"
        )


def refuse_foreign(folder: Path, stage: str, config: dict | None) -> None:
    """Raise UsageError where the folder holds something else than a run of this stage.

    Args:
        config: the content of its config.json; None without one.
    """
    if config is None:
        present = [name for name in OWN if (folder / name).exists()]
        if present:
            raise UsageError(
                f"--output_dir={folder} holds {', '.join(present)} but no run's"
                " config.json: not a run's folder, choose another"
            )
        inside = sorted(path.parent.name for path in folder.glob("*/config.json"))
        if inside:
            raise UsageError(
                f"--output_dir={folder} holds other runs ({', '.join(inside[:4])}); name"
                " a folder of this run's own"
            )
    elif config.get("step") != stage:
        raise UsageError(
            f"--output_dir={folder} holds a {config.get('step')} run,"
            f" not a {stage} run; choose another folder"
        )


def take(folder: Path, overwrite: bool, resume: bool) -> None:
    """Lock the folder. Raises UsageError: another process works in it, or did since this one
    looked.
    """
    folder.mkdir(parents=True, exist_ok=True)
    hold(folder)
    if not overwrite and (is_finished(folder) or has_checkpoint(folder) != resume):
        files.release_lock(folder)
        raise UsageError(
            f"--output_dir={folder}: another process changed it in the meantime;"
            " run the command again"
        )


def hold(folder: Path) -> None:
    """Take the folder's lock. Raises UsageError: another process has it."""
    while not files.take_lock(folder):
        refuse_locked(folder)


def clean(folder: Path) -> None:
    """Remove what a process that died left half-written."""
    for partial in folder.glob(".tmp-*"):
        _remove(partial)
    for name in checkpoint.NAMES:  # of a run that died before it removed the old one
        if (folder / name).exists():
            _remove(files.replaced(folder / name))


def set_aside(folder: Path) -> None:
    """Make room for a new run; the old one stays in REPLACED while nothing replaces it."""
    aside, kept = folder / REPLACED, has_checkpoint(folder)
    if kept:
        _remove(aside)
        aside.mkdir()
    for name in OWN:
        path = folder / name
        if kept and path.exists():
            path.rename(aside / name)
        _remove(path)


def drop_replaced(folder: Path) -> None:
    """A checkpoint is there: what it replaces can go."""
    _remove(folder / REPLACED)


def await_put_back(folder: Path) -> None:
    """Wait until the first process has put back what is to be put back."""
    for _ in range(PATIENCE):
        if not _is_aside(folder):
            return
        time.sleep(0.1)


def _is_aside(folder: Path) -> bool:
    """Whether a run was to be replaced by one that has no checkpoint."""
    began = (folder / "config.json").exists()
    return (folder / REPLACED).is_dir() and not (began and has_checkpoint(folder))


def put_back(folder: Path) -> bool:
    """Put back what a run was to replace, if it has no checkpoint; whether there was something."""
    aside = folder / REPLACED
    if not _is_aside(folder):
        return False
    for name in OWN:
        if (aside / name).exists():
            _remove(folder / name)
            (aside / name).rename(folder / name)
    _remove(aside)
    files.release_lock(folder)
    return True


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
