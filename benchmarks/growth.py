"""How cost grows: with users, history length, layers and processes; and, computed, what LLaMA-2-7B
costs on one H100. benchmarks/catalogue.py has the same for items.

    python -m benchmarks.growth                          # a quarter of an hour on 2 cores
    python -m benchmarks.growth --users 1000 --lengths 10 --layers 2           # a look

Each row is a fresh process, and its peak memory holds everything: weights, data and item table.
Steps are a student's, trained in full on base small, over 12,101 items. Writes growth.json and
growth.md into --output_dir.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from transformers import LlamaConfig

from benchmarks import measure
from benchmarks.efficiency import PROMPT, RESPONSE, SHAPES, VOCABULARY
from datasets.interactions import read_csv
from datasets.sequences import training_samples
from models.catalogue import catalogue_cross_entropy
from utils import cli, processes
from utils.files import check_writable
from utils.flags import PositiveInt, flag

DIM, ITEMS, HISTORY, LAYERS, REPEATS = 128, 12_101, 10, 4, 5
ROOT = Path(__file__).parent.parent
H100, SHARE = 989e12, 0.4  # bf16 operations per second, and the share that a step is taken to reach
CLOTHING, HISTORY_7B = 1_219_678, 6  # its users: 9.25 interactions each, three of them targets
PEOPLE, THINGS, EVENTS = 1000, 2000, 12  # of the log that processes share


class Row(NamedTuple):
    """Of one size of one thing: users served, seconds, peak bytes (None: not measured)."""

    what: str
    size: int
    users: int
    seconds: float
    peak: int | None


def shape_of(name: str, slots: int, n_items: int = ITEMS) -> measure.Shape:
    config = LlamaConfig(
        **SHAPES[name],
        num_hidden_layers=32,
        vocab_size=VOCABULARY.get(name, 390),
        max_position_embeddings=4096,
        use_cache=False,
    )
    torch.manual_seed(0)
    return measure.Shape(config, PROMPT, RESPONSE, torch.randn(n_items, DIM) / DIM**0.5, slots)


def student_step(n_layers: int, length: int, n_users: int) -> Callable[[], object]:
    """A training step over users whose histories all have `length` items."""
    shape = shape_of("small", length)
    model = shape.model(n_layers, "full")
    history, target = torch.randint(ITEMS, (n_users, length)), torch.randint(ITEMS, (n_users,))

    def loss(_):
        return catalogue_cross_entropy(model(history).user, model.item_table, target)

    step = measure.training_step(model, loss)
    return lambda: step(None)


def reading(path: str) -> Callable[[], object]:
    """A domain's CSV to training samples, checked."""
    return lambda: training_samples(read_csv(Path(path)), "last", 30)


def measured(what: str, size: int, users: int, prepare: Callable, *arguments: object) -> Row:
    device = torch.device("cpu")
    run = prepare(*arguments)
    run()
    repeats = REPEATS if users <= 1000 else 1
    seconds = float(np.median([measure.seconds(run, device) for _ in range(repeats)]))
    del run
    peak = measure.peak_memory(prepare, *arguments, device=device, with_preparation=True)
    return Row(what, size, users, seconds, peak)


def write_sequences(path: Path, n_users: int, n_items: int, length: int) -> None:
    """Made-up sequences, in the form of a domain's CSV."""
    rng = np.random.default_rng(0)
    with open(path, "w") as file:
        file.write("reviewerID,asin\n")
        for user in range(n_users):
            items = rng.integers(1, n_items + 1, length).tolist()
            file.write(f'u{user},"{items}"\n')


def with_processes(n: int, folder: Path) -> Row:
    """finetune.py by torchrun, the machine's threads divided among its processes."""
    write_sequences(folder / "p.csv", PEOPLE, THINGS, EVENTS)
    np.save(folder / "p.npy", np.random.default_rng(0).standard_normal((THINGS + 1, DIM)) / 11)
    place = {"data_path": folder / "p.csv", "item_table": folder / "p.npy"}
    place |= {"output_dir": folder / f"run{n}", "base_model": "small"}
    short = {"llama_decoder_nums": LAYERS, "max_steps": 12, "eval_steps": 12, "save_steps": 12}
    flags = [f"--{name}={value}" for name, value in (place | short).items()]
    launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={n}", "--standalone"]
    environment = os.environ | {"OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // n))}
    command = [sys.executable, *(launcher if n > 1 else []), str(ROOT / "finetune.py"), *flags]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)
    results = json.loads((folder / f"run{n}" / "results.json").read_text())
    return Row("processes", n, 12 * 256, results["train_seconds"], None)


def table(rows: list[Row]) -> str:
    lines = ["| what | size | users | ms per user | peak GiB |", "|---|---|---|---|---|"]
    for row in rows:
        each = f"{row.seconds / row.users * 1e3:.4g}"
        peak = f"{row.peak / 2**30:.2f}" if row.peak else "-"
        lines.append(f"| {row.what} | {row.size:,} | {row.users:,} | {each} | {peak} |")
    return "\n".join(lines)


def seven_billion() -> str:
    """LLaMA-2-7B's hours on one H100, from operations counted and the share of its rate assumed."""
    shape = shape_of("llama-2-7b", 30)
    lengths = np.full(256, HISTORY_7B)
    head = "| layers | operations per user, training | hours per epoch |"
    lines = [
        f"{head} operations per user, inference | hours over all users |",
        "|---|---|---|---|---|",
    ]
    for n_layers in (4, 8, 32):
        cells = [str(n_layers)]
        for training in (True, False):
            each = shape.operations(lengths, n_layers, "lora", training) / len(lengths)
            cells += [f"{each / 1e9:.1f} G", f"{each * CLOTHING / (H100 * SHARE) / 3600:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


@cli.command
def main(
    *,
    users: list[PositiveInt] = flag([10**3, 10**4, 10**5, 10**6], "users of a CSV"),
    lengths: list[PositiveInt] = flag([5, 10, 20, 50, 100, 200], "items of every history"),
    layers: list[PositiveInt] = flag([1, 2, 4, 8, 16, 32], "decoder layers"),
    n_processes: list[PositiveInt] = flag([1, 2], "processes of one torchrun"),
    batch_size: PositiveInt = flag(128, "users of a step"),
    output_dir: str = flag("output/benchmarks", "where growth.json and growth.md go"),
) -> dict:
    """Measure time per user and peak memory over sizes."""
    check_writable(Path(output_dir), "--output_dir")
    device = processes.choose_device("cpu")
    rows: list[Row] = []

    def add(row: Row) -> None:
        rows.append(row)
        print(table([row]).splitlines()[-1], flush=True)

    started = time.perf_counter()
    Path(output_dir).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output_dir) as folder:
        for n in users:
            path = Path(folder) / "users.csv"
            write_sequences(path, n, ITEMS, HISTORY)
            add(measured("users of a CSV", n, n, reading, str(path)))
        for n in lengths:
            work = student_step, LAYERS, n, batch_size
            add(measured("history length", n, batch_size, *work))
        for n in layers:
            work = student_step, n, HISTORY, batch_size
            add(measured("layers", n, batch_size, *work))
        for n in n_processes:
            add(with_processes(n, Path(folder)))
    print(f"{time.perf_counter() - started:.0f} s")
    computed = seven_billion()
    result = measure.machine(device) | {"rows": [row._asdict() for row in rows]}
    text = f"{table(rows)}\n\nComputed, LLaMA-2-7B with LoRA on one H100:\n\n{computed}"
    measure.write_report(Path(output_dir), "growth", result, text)
    return result


if __name__ == "__main__":
    cli.run(main)
