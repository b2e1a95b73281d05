"""metrics.jsonl: what a run logs as it goes, and how long it has trained."""

import json
from pathlib import Path
from typing import Any

from utils import distributed
from utils.runlog import write_json

CLOCK = "clock.json"


class MetricsLog:
    """Appends a JSON line per event to metrics.jsonl and, where asked, numbers to TensorBoard; the first process alone."""

    def __init__(self, folder: str | Path, tensorboard: bool) -> None:
        self.path = Path(folder) / "metrics.jsonl"
        self.tensorboard, self.writer = tensorboard, None

    def cut(self, step: int) -> None:
        """Drop what was logged after `step`: those steps come again."""
        if not distributed.is_first() or not self.path.is_file():
            return
        lines = self.path.read_text(encoding="utf-8").splitlines()
        kept = [line for line in lines if (event := parsed_event(line)) is not None and event["step"] <= step]
        partial = self.path.with_name(f".tmp-{self.path.name}")
        partial.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        partial.replace(self.path)

    def clock(self, seconds: float) -> None:
        """Note the seconds trained so far; apart from the checkpoints, which are the same bytes whatever the time."""
        write_json(self.path.with_name(CLOCK), {"seconds": seconds})

    def seconds(self) -> float:
        try:
            return float(json.loads(self.path.with_name(CLOCK).read_text(encoding="utf-8"))["seconds"])
        except (OSError, ValueError, KeyError, TypeError):
            return 0.0

    def add(self, event: str, step: int, values: dict[str, Any]) -> None:
        if not distributed.is_first():
            return
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"event": event, "step": step, **values}) + "\n")
        if self.tensorboard and self.writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(self.path.parent / "tensorboard"), purge_step=step)
        if self.writer is not None:
            for name, value in values.items():
                if isinstance(value, (int, float)):
                    self.writer.add_scalar(f"{event}/{name}", value, step)
            self.writer.flush()


def parsed_event(line: str) -> dict[str, Any] | None:
    """A line of metrics.jsonl, None where a kill tore it."""
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return event if isinstance(event, dict) and {"event", "step"} <= set(event) else None
