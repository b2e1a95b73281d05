"""The metrics of a run during training (metrics.jsonl), and its training time (clock.json)."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine import files, processes
from engine.files import write_json

if TYPE_CHECKING:
    import torch

SPEED = ("users_per_second", "peak_mib")  # of a line of training; they differ from run to run
CLOCK = "clock.json"


class MetricsLog:
    """metrics.jsonl: a JSON line per event, and TensorBoard events where asked.

    The first process alone writes.
    """

    def __init__(self, folder: Path, tensorboard: bool) -> None:
        self.path = Path(folder) / "metrics.jsonl"
        self.tensorboard, self.writer = tensorboard, None

    def add(self, event: str, step: int, values: dict[str, Any]) -> None:
        """Append the numbers of an event (train or valid) at an optimizer step."""
        if not processes.is_first():
            return
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"event": event, "step": step, **values}) + "\n")
        if not self.tensorboard:
            return
        if self.writer is None:
            from torch.utils.tensorboard import SummaryWriter

            path = str(self.path.parent / "tensorboard")
            self.writer = SummaryWriter(path, purge_step=step)
        for name, value in values.items():
            if isinstance(value, (int, float)):
                self.writer.add_scalar(f"{event}/{name}", value, step)
        self.writer.flush()

    def cut(self, step: int) -> None:
        """Drop what was logged after `step`: a resumed run takes those steps again."""
        if not processes.is_first() or not self.path.is_file():
            return
        kept = [event for event in events(self.path) if event["step"] <= step]
        with files.replacing(self.path) as partial:
            partial.write_text("".join(json.dumps(e) + "\n" for e in kept), encoding="utf-8")

    def write_seconds(self, seconds: float) -> None:
        """Write the seconds trained so far; a checkpoint's bytes do not depend on timing."""
        write_json(self.path.with_name(CLOCK), {"seconds": seconds})

    def seconds(self) -> float:
        """The seconds noted last; 0 where the note is missing or damaged."""
        try:
            text = self.path.with_name(CLOCK).read_text(encoding="utf-8")
            return float(json.loads(text)["seconds"])
        except (OSError, ValueError, KeyError, TypeError):
            return 0.0


def peak_mib(device: "torch.device") -> float:
    """The most memory so far: of the CUDA device, else of this process; MiB."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    unit = 1 if sys.platform == "darwin" else 2**10  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def events(path: Path) -> list[dict[str, Any]]:
    """The events of a metrics.jsonl, without lines that a killed run left incomplete."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict) and {"event", "step"} <= event.keys():
            found.append(event)
    return found
