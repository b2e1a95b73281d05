"""The paper's efficiency table, plain and ours: time, parameters and memory.

    python -m benchmarks.efficiency                    # CPU: shape small, the same layer counts
    python -m benchmarks.efficiency --shape llama-2-7b --batch_size 256 --eval_batch_size 512

Weights are random. Prompt and response have 62 and 7 tokens. History lengths and the catalogue are
those of the domain, by default the demo domain. In every round each row is built in a process of
its own, and takes one step untimed and one timed: rows alternate. Figures are medians over rounds.
A row whose process dies takes half the micro-batch, accumulating to the batch; one that fits with
none stays in the table as out of memory. Inference is history to user vector, without ranking.
Writes efficiency.json and efficiency.md.
"""

import functools
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers import LlamaConfig

from benchmarks import measure, plain
from benchmarks.measure import DIM, seconds, training_step
from datasets import sequences
from datasets.domain import Domain
from datasets.interactions import read_csv
from distill import StudentLoss, loss_parts
from engine import cli, processes
from engine.cli import PositiveInt, flag
from engine.errors import one_line
from engine.files import check_writable, markdown
from models.builtin import BUILT_IN
from models.catalogue import catalogue_cross_entropy
from models.losses import Output
from models.sasrec import SASRec
from utils.flags import Data, SASRecModel

SLOTS, BLOCKS = 30, 4
PROMPT, RESPONSE = list(range(62)), list(range(62, 69))
LLAMA_2_7B = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "vocab_size": 32000,
}
SHAPES = BUILT_IN | {"llama-2-7b": LLAMA_2_7B}
# training h per epoch / inference h / trainable B / inference B; one A100, batches of 256 and 512
PAPER = {
    "E4SRec, 32 layers": "3.95 / 0.415 / 0.023 / 6.631",
    "E4SRec, 4 layers": "0.90 / 0.083 / 0.003 / 0.944",
    "SLMRec 4 <- 8": "0.60 / 0.052 / 0.003 / 0.944",
    "SASRec": "0.014 / 0.015 / 0.007 / 0.007",
}


class Setting(NamedTuple):
    """All that a row is built from; sent to the row's process."""

    csv: str
    shape: str
    batch_size: int
    eval_batch_size: int
    device: str


class Model(NamedTuple):
    """train takes micro-batches of sample indices, infer one batch; parameters as the paper counts
    them, decoder and embeddings with LoRA but without the adapters.
    """

    train: Callable[..., None]
    infer: Callable[[np.ndarray], Tensor]
    trained: int
    parameters: int


@functools.lru_cache(1)
def samples_of(setting: Setting) -> sequences.Samples:
    return sequences.training_samples(read_csv(setting.csv), "last", SLOTS)


def batches_of(setting: Setting, n: int, batch_size: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, len(samples_of(setting)), batch_size) for _ in range(n)]


def llm_row(which: str, n_layers: int, distilled: bool, setting: Setting) -> Model:
    """`which` is plain or ours; distilled: the whole loss, against states in memory."""
    samples, device = samples_of(setting), torch.device(setting.device)
    options = {"vocab_size": 390} | SHAPES[setting.shape]
    config = LlamaConfig(**options, num_hidden_layers=32, max_position_embeddings=4096)
    torch.manual_seed(0)
    table = nn.Embedding(samples.data.n_items, DIM).weight.detach().mul_(0.1).to(device)
    shape, bf16 = measure.Shape(config, PROMPT, RESPONSE, table, SLOTS), device.type == "cuda"
    model = shape.model(n_layers, "lora", BLOCKS if distilled else 1, distilled, bf16)
    if which == "plain":
        model = plain.plain_twin(model, (measure.RANK, measure.RANK, measure.TARGETS))[0]

    def loss(rows):
        history, target = samples.histories(rows), samples.targets(rows).to(device)
        if which == "plain":
            return plain.plain_loss(model(history), None, model.item_table, target)
        output, teacher = model(history), None
        if distilled:
            states = torch.randn(len(rows), BLOCKS, config.hidden_size).to(device)
            teacher = Output(torch.randn(len(rows), DIM).to(device), states, output.exits[:, :0])
        parts = loss_parts(output, teacher, None, model.item_table, target, StudentLoss())
        return parts["total"]

    @torch.no_grad()
    def plain_encode(history):
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            return model.eval()(history).user

    @functools.cache
    def encoder():  # made when first asked: the prompt, once
        return plain_encode if which == "plain" else model.user_encoder()

    decoder = model.llama if which == "plain" else model.decoder
    sizes = [(p.numel(), p.requires_grad) for p in decoder.parameters()]
    return Model(
        training_step(model, loss, bf16),
        lambda rows: encoder()(samples.histories(rows)),
        sum(n for n, trained in sizes if trained),
        sum(n for n, _ in sizes),
    )


def sasrec_row(setting: Setting) -> Model:
    samples, device = samples_of(setting), torch.device(setting.device)
    torch.manual_seed(0)
    model = SASRec(samples.data.n_items, SLOTS, **SASRecModel(emb_dim=DIM).values()).to(device)

    def loss(rows):
        targets = samples.shifted_targets(rows)
        targets = targets[targets != samples.data.n_items].to(device)
        states = model.states(samples.histories(rows))
        return catalogue_cross_entropy(states, model.item_table, targets)

    def infer(rows):
        return model.user_encoder()(samples.histories(rows).to(device))

    size = sum(p.numel() for p in model.parameters())
    return Model(training_step(model, loss), infer, size, size)


SIZES = [(which, n) for which in ("plain", "ours") for n in (32, 8, 4)]
ROWS: dict[str, Callable[[Setting], Model]] = {
    f"E4SRec, {n} layers, {which}": functools.partial(llm_row, which, n, False)
    for which, n in SIZES
}
ROWS["SLMRec 4 <- 8, ours"] = functools.partial(llm_row, "ours", 4, True)
ROWS["SASRec, ours"] = sasrec_row


def measured(*given: Any) -> dict[str, Any] | None:
    """`_measure(*given)` in a fresh process; None where it died, or ran out of memory."""
    spawn, threads = multiprocessing.get_context("spawn"), torch.get_num_threads()
    with ProcessPoolExecutor(1, spawn, torch.set_num_threads, (threads,)) as pool:
        try:
            return pool.submit(_measure, *given).result()
        except Exception as error:  # a dead process too
            print(f"{given[0]}: {one_line(error)}")
            return None


def _measure(name: str, setting: Setting, micro: int, number: int) -> dict[str, Any]:
    """A step and an inference batch of a row, each after one that warms up.

    Args:
        number: of the round; says which samples.
    Returns:
        seconds of both, the most bytes that steps took beyond what the process held before, and the
        sizes of Model.
    """
    device = torch.device(setting.device)
    on_gpu = device.type == "cuda"
    torch.mm(torch.ones(256, 256), torch.ones(256, 256))  # the threads' own buffers
    before = torch.cuda.memory_allocated() if on_gpu else _memory("VmRSS")
    model = ROWS[name](setting)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    else:  # of this process; getrusage's is the parent's
        Path("/proc/self/clear_refs").write_text("5")
    for rows in batches_of(setting, number + 2, setting.batch_size)[number:]:
        step = seconds(lambda: model.train(*_micro_batches(rows, micro)), device)
    peak = (torch.cuda.max_memory_allocated() if on_gpu else _memory("VmHWM")) - before
    for rows in batches_of(setting, number + 2, setting.eval_batch_size)[number:]:
        parts = _micro_batches(rows, setting.batch_size)
        infer = seconds(lambda: [model.infer(part) for part in parts], device)
    sizes = {"trained_parameters": model.trained, "parameters": model.parameters}
    return {"seconds": (step, infer), "peak_bytes": peak} | sizes


def _memory(field: str) -> int:
    """Bytes of this process's resident memory now (VmRSS) or at most (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(field))
    return int(line.split()[1]) * 1024


def _micro_batches(rows: np.ndarray, micro: int) -> list[np.ndarray]:
    return np.split(rows, range(micro, len(rows), micro))


@cli.command
def main(
    *,
    data: Data,
    shape: Literal["tiny", "small", "llama-2-7b"] = flag(
        "small", "of the LLaMA, with random weights"
    ),
    batch_size: PositiveInt = flag(
        128,
        "users per training step; at 128 the plain 32-layer row of shape small takes about 13 GiB",
    ),
    eval_batch_size: PositiveInt = flag(256, "users per inference batch"),
    repeats: PositiveInt = flag(3, "rounds"),
    rows: list[str] = flag(["all"], "all, or beginnings of rows' names, such as SASRec"),
    device: Literal["auto", "cpu", "cuda"] = flag("auto", "auto uses cuda if available"),
    output_dir: str = flag("output/benchmarks", "where efficiency.json and efficiency.md go"),
) -> dict:
    """Print the paper's efficiency table at a shape, and the ratios to the 32-layer model."""
    names = [name for name in ROWS if rows == ["all"] or name.startswith(tuple(rows))]
    unknown = [text for text in rows if not any(name.startswith(text) for name in ROWS)]
    expected = f"expected all, or beginnings of {'; '.join(ROWS)}"
    cli.check((rows == ["all"] or not unknown, f"--rows={','.join(unknown)}: {expected}"))
    folder = Path(output_dir)
    check_writable(folder, "--output_dir")
    _, csv = Domain.of(data).read()
    device = processes.choose_device(device)
    setting = Setting(str(csv), shape, batch_size, eval_batch_size, device.type)
    n = len(samples_of(setting))
    about = measure.machine(device) | setting._asdict() | {"samples": n, "repeats": repeats}
    print("  ".join(f"{name} {value}" for name, value in about.items()))
    rounds: dict[str, list[dict]] = {name: [] for name in names}
    micro = dict.fromkeys(names, batch_size)
    for i in range(repeats):
        for name in names:
            while micro[name]:
                found = measured(name, setting, micro[name], i)
                if found is not None:
                    rounds[name].append(found)
                    step, infer = found["seconds"]
                    print(f"{name:28s} step {step:8.3f} s  inference {infer:8.3f} s")
                    break
                micro[name] //= 2  # 0: it fits with none
    about["rows"], times = {}, {}
    for name, found in rounds.items():
        about["rows"][name] = {"micro_batch_size": micro[name], "peak_bytes": None}
        if micro[name]:
            times[name] = [each.pop("seconds") for each in found]
            step, infer = np.median(np.array(times[name]), axis=0)
            about["rows"][name] |= max(found, key=lambda each: each["peak_bytes"]) | {
                "step_seconds": step,
                "train_seconds_per_epoch": step * n / batch_size,
                "inference_seconds": infer * n / eval_batch_size,
            }
    about["ratios"] = ratios(times)
    measure.write_report(folder, "efficiency", about, table(about))
    return about


def ratios(times: dict[str, list]) -> dict[str, list[float]]:
    """32 layers over four, training and inference: medians of the rounds' ratios."""
    spent = {name: np.array(rounds) for name, rounds in times.items()}
    large = "E4SRec, 32 layers"
    compared = {
        "plain / plain, pruning alone": (f"{large}, plain", "E4SRec, 4 layers, plain"),
        "ours / ours, pruning and distillation": (f"{large}, ours", "SLMRec 4 <- 8, ours"),
        "plain / ours, all": (f"{large}, plain", "SLMRec 4 <- 8, ours"),
        "plain / ours, without distillation": (f"{large}, plain", "E4SRec, 4 layers, ours"),
    }
    found = {}
    for label, (one, other) in compared.items():
        if one in spent and other in spent:
            found[label] = np.median(spent[one] / spent[other], axis=0).tolist()
    return found


def table(about: dict) -> str:
    """Markdown: the rows, then the ratios beside the paper's."""
    head = ["row", "train s / epoch", "inference s", "trained M", "inference M", "peak MiB"]
    lines = []
    for name, row in about["rows"].items():
        paper = PAPER.get(name.rpartition(", ")[0], "-")
        if row["peak_bytes"] is None:
            lines.append([name, "out of memory", *"----", paper])
            continue
        cells = [name, f"{row['train_seconds_per_epoch']:,.1f}", f"{row['inference_seconds']:,.1f}"]
        cells += [f"{row[key] / 1e6:,.2f}" for key in ("trained_parameters", "parameters")]
        cells += [f"{row['peak_bytes'] / 2**20:,.0f}", paper]
        lines.append(cells)
    text = markdown([*head, "paper: h / h / B / B"], lines)
    if not about["ratios"]:
        return text
    factors = about["ratios"] | {"the paper, one A100": (6.6, 8.0)}
    lines = [[label, f"{train:.1f}x", f"{infer:.1f}x"] for label, (train, infer) in factors.items()]
    return text + "\n\n" + markdown(["32 layers over 4", "train", "inference"], lines)


if __name__ == "__main__":
    cli.run(main)
