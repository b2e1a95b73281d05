"""The first nine minutes on a GPU: CUDA's tests, all four steps, speed, memory and a profile.

    python -m benchmarks.first_gpu                # writes docs/benchmarks/first_gpu.md, to commit
    python -m benchmarks.first_gpu --dry true --output output/first_gpu.md     # CPU, two minutes

Every part is a command of its own with a time limit. One that fails or takes too long is reported,
and the others go on.
"""

import json
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import measure
from datasets import sequences
from datasets.domain import Domain
from datasets.prompts import read_template, tokenise
from engine import cli, processes
from engine.cli import flag
from engine.errors import RunError
from engine.files import check_writable
from models.base import open_base
from models.losses import next_item
from utils.flags import Data

TAIL = 60  # lines of a part's output that are kept
PROFILE = "from benchmarks import first_gpu; first_gpu.profile_step('{}', '{}')"


def parts(device: str, dry: bool, folder: str) -> list[tuple[str, int, str]]:
    """Title, seconds allowed, and Python's arguments, of every part.

    Args:
        folder: where the runs go.
    """
    base, shape = ("tiny", "tiny") if dry else ("small", "llama-2-7b")
    short = f"--max_steps {6 if dry else 200} --device {device}"
    table = f"--item_table {folder}/item.pkl"
    rows = "steps,sasrec" if dry else "steps,distill,inference,sasrec"
    sizes = ["SASRec"] if dry else ["E4SRec, 8 layers"]  # plain and ours
    sizes = shlex.quote(json.dumps(sizes))
    speed = f"--device {device} --output_dir {folder}"
    rounds, pairs = (1, 1) if dry else (2, 5)
    profiled = shlex.quote(PROFILE.format(device, base))
    distil = f"distill.py --teacher {folder}/teacher --output_dir {folder}/student {table} {short}"
    teach = f"finetune.py --output_dir {folder}/teacher --base_model {base} {table} {short}"
    memory = f"-m benchmarks.efficiency --shape {shape} {speed} --repeats {rounds} --rows {sizes}"
    race = f"-m benchmarks.throughput --base_model {base} {speed} --repeats {pairs} --rows {rows}"
    return [
        ("Tests of CUDA", 60, "-m pytest -q tests/test_cuda.py"),
        ("Step 1", 60, f"train_sr_trad.py --output_dir {folder}/sasrec {short}"),
        ("Step 2", 30, f"extract_emb.py --sasrec {folder}/sasrec {table}"),
        ("Step 3", 60, teach),
        ("Step 4", 60, distil),
        ("Speed beside the plain form", 100, race),
        (f"Memory and time at the shape {shape}", 130, memory),
        ("Profile of a student's step", 40, f"-c {profiled}"),
    ]


def profile_step(device: str, base_model: str) -> None:
    """Print where a student's step spends its time."""
    data, _ = Domain.of(Data()).read()
    base = open_base(base_model)
    table = torch.randn(data.n_items, measure.DIM, device=device).mul_(0.1)
    ids = tokenise(read_template("alpaca"), base.location)
    model = measure.Shape(base.config, *ids, table, 30).model(4, "full")
    samples = sequences.training_samples(data, "last", 30)

    def loss(rows):
        target = samples.targets(rows).to(device)
        return next_item(model(samples.histories(rows)).user, table, target)

    step, rows = measure.training_step(model, loss), samples.evenly(256)
    step(rows)
    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device == "cuda")
    with profile(activities=kinds) as found:
        step(rows)
    options = {"row_limit": 15, "max_name_column_width": 40}
    print(found.key_averages().table(sort_by=f"self_{device}_time_total", **options))


@cli.command
def main(
    *,
    dry: bool = flag(False, "on CPU, with tiny shapes: whether every part runs"),
    output: str = flag("docs/benchmarks/first_gpu.md", "where the page goes"),
) -> Path:
    """Run every part and write one page."""
    page = Path(output)
    check_writable(page.parent, "--output")
    device = processes.choose_device("cpu" if dry else "cuda")
    sections, failed = [], []
    about = measure.machine(device)
    sections.append("\n".join(f"- {name}: {value}" for name, value in about.items()))
    with tempfile.TemporaryDirectory() as folder:
        for title, limit, words in parts(device.type, dry, folder):
            started = time.perf_counter()
            print(f"== {title}")
            try:
                command = [sys.executable, *shlex.split(words)]
                limit *= 5 if dry else 1  # the limits are of a GPU's machine
                done = subprocess.run(command, capture_output=True, text=True, timeout=limit)
                text, status = done.stdout or done.stderr, done.returncode
                text += done.stderr[-2000:] * (status != 0)
            except subprocess.TimeoutExpired as error:
                text, status = (error.stdout or b"").decode(errors="replace"), "timed out"
            spent = time.perf_counter() - started
            verdict = f"{spent:.0f} s" if status == 0 else f"{spent:.0f} s, FAILED ({status})"
            failed += [title] if status != 0 else []
            shown = "\n".join(text.splitlines()[-TAIL:])
            sections.append(f"## {title}: {verdict}\n\n`python {words}`\n\n```\n{shown}\n```")
            print(f"{verdict}")
    page.parent.mkdir(parents=True, exist_ok=True)
    title = "# First run on a GPU" + " (dry run on CPU: figures mean nothing)" * dry
    page.write_text(title + "\n\n" + "\n\n".join(sections) + "\n", encoding="utf-8")
    print(f"wrote {page}")
    if failed:
        raise RunError(f"failed: {', '.join(failed)}; {page} says why")
    return page


if __name__ == "__main__":
    cli.run(main)
