"""Files: JSON written whole or not at all, hashes, folders that can be written to, and locks."""

import hashlib
import json
import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.errors import RunError, UsageError

if TYPE_CHECKING:
    from filelock import FileLock

LOCK, OWNER = ".lock", ".lock-owner"  # the owner's file says who holds the lock
LOOK_SECONDS = 1.0  # two commands that look at a lock at the same moment do not refuse each other


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path`, renamed to it at the end; removed when the body fails."""
    path = Path(path)
    partial = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: str | Path, content: Any) -> None:
    """Write JSON atomically."""
    with replacing(path) as partial, open(partial, "w", encoding="utf-8") as file:
        file.write(json.dumps(content, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_json(path: str | Path, what: str) -> dict[str, Any]:
    """Read a JSON object.

    Args:
        what: what the file is, for messages.
    Raises:
        UsageError: the file is missing or damaged.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"{what} not found: {path}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise UsageError(f"{path}: damaged, not JSON") from None
    if not isinstance(content, dict):
        raise UsageError(f"{path}: damaged, not a JSON object")
    return content


def markdown(head: list[str], lines: list[list[Any]]) -> str:
    """A Markdown table."""
    rows = [head, ["---"] * len(head), *lines]
    cells = [" | ".join(str(cell).replace("|", "\\|") for cell in row) for row in rows]
    return "\n".join(f"| {row} |" for row in cells)


def file_sha256(path: str | Path) -> str:
    """sha256 of a file, read as a stream."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_writable(folder: Path, flag: str) -> None:
    """Refuse a folder that cannot be made or written to. Raises UsageError: naming the flag, the
    folder and the part of its path that is in the way.
    """
    there = next(part for part in (folder, *folder.parents) if part.exists())
    if not there.is_dir():
        raise UsageError(f"{flag}={folder}: {there} is a file, not a folder")
    if not os.access(there, os.W_OK):
        raise UsageError(f"{flag}={folder}: {there} is not writable")


def copy(source: Path, target: Path) -> None:
    """Copy a file. Raises RunError: naming the target, where it cannot be written."""
    try:
        shutil.copyfile(source, target)
    except OSError as error:
        raise RunError(f"{target}: {error.strerror or error}") from None


@contextmanager
def making(folder: Path) -> Iterator[Path]:
    """A temporary folder beside `folder`, to be renamed; removed with what is still in it."""
    partial = folder.with_name(f".tmp-{folder.name}-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def let_all_read(folder: Path) -> None:
    """Let everybody read a folder's files; safetensors are written for the owner alone."""
    for path in folder.iterdir():
        path.chmod(0o644)


def save_whole(folder: Path, *parts: Any) -> None:
    """Save a model and its tokenizer into a folder that appears only when it is complete.

    If another process creates the folder in the meantime, its folder is kept.

    Args:
        parts: what has `save_pretrained`.
    Raises:
        OSError: the folder cannot be written.
    """
    with making(folder) as partial:
        for part in parts:
            part.save_pretrained(partial)
        let_all_read(partial)
        try:
            partial.rename(folder)
        except OSError:
            if not (folder / "config.json").exists():
                raise


def check_replaceable(folder: Path, flag: str) -> Path:
    """The real folder behind a name, one that can be moved aside. Raises UsageError: it is a mount
    point, or the command runs in it.
    """
    real = folder.resolve()
    if real.is_mount():
        raise UsageError(f"{flag}={folder}: is a mount point; name a folder inside it")
    if Path.cwd().is_relative_to(real):
        raise UsageError(f"{flag}={folder}: the command runs in it; name a folder inside it")
    check_writable(real.parent, flag)
    return real


def replaced(folder: Path) -> Path:
    """Where a folder is while another one takes its place; it stays if the process dies then."""
    return folder.with_name(f".old-{folder.name}")


def replace_folder(partial: Path, folder: Path) -> None:
    """Put a finished folder in the place of another one, which is renamed first: a rename cannot
    replace a folder that is not empty. Raises OSError: it cannot be moved; the old one is back in
    its place.
    """
    old = replaced(folder)
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    try:
        partial.rename(folder)
    except OSError:
        if old.exists():
            old.rename(folder)
        raise
    if os.name != "nt":  # Windows cannot flush a folder's names
        descriptor = os.open(folder.parent, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    shutil.rmtree(old, ignore_errors=True)


_held: dict[Path, "FileLock"] = {}  # the locks of this process, by folder


def take_lock(folder: Path, timeout: float = LOOK_SECONDS) -> bool:
    """Take an exclusive lock on a folder, among the processes of this machine.

    A dead process's lock is free. The lock's file stays, so that those who wait share one file.

    Args:
        timeout: seconds to wait; -1 waits as long as it takes.
    Returns:
        Whether this process holds the lock now.
    """
    from filelock import FileLock, Timeout

    if folder.resolve() in _held:
        return True
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=timeout)
    except Timeout:
        return False
    _held[folder.resolve()] = lock
    owner = f"{os.getpid()} on {platform.node()}\n"
    (folder / OWNER).write_text(owner, encoding="utf-8")
    return True


def release_lock(folder: Path) -> None:
    """Give a lock back; does nothing where this process does not hold it."""
    lock = _held.pop(folder.resolve(), None)
    if lock is not None:
        (folder / OWNER).unlink(missing_ok=True)
        lock.release()


def lock_owner(folder: Path) -> str | None:
    """Process and machine of another process that holds the lock; None where none does."""
    if folder.resolve() in _held or not (folder / LOCK).exists():
        return None
    try:
        if take_lock(folder):
            release_lock(folder)
            return None
    except OSError:  # this process may not write there; the owner's file goes with the lock
        if not (folder / OWNER).exists():
            return None
    try:
        return (folder / OWNER).read_text(encoding="utf-8").strip() or "?"
    except OSError:
        return "?"
