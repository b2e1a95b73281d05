"""The paper's efficiency table: E4SRec with 32, 8 and 4 layers and SLMRec, plain and ours, time,
parameters and memory.

    python -m benchmarks.efficiency                    # CPU: shape small, the same layer counts
    python -m benchmarks.efficiency --shape llama-2-7b --batch_size 256 --eval_batch_size 512

Weights are random. Prompt and response have 62 and 7 tokens. History lengths and the catalogue are
those of the domain, by default the demo domain. In every round each row is built again, takes
one step untimed and one timed: rows alternate, and only one is in memory. Figures are medians over
rounds. On CUDA each row takes the largest micro-batch that fits, accumulating to the batch. A row
that fits with none stays in the table as out of memory. Inference is history to user vector,
without ranking. Padded tokens are those of the plain layout, 99 per user, whether computed or not.
Writes efficiency.json and efficiency.md into --output_dir.
"""

import dataclasses
import functools
import gc
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers import LlamaConfig

from benchmarks import measure, plain
from benchmarks.measure import seconds, training_step
from datasets import sequences, teacher_states
from datasets.domain import Domain
from datasets.interactions import read_csv
from models.builtin import BUILT_IN
from models.catalogue import catalogue_cross_entropy
from models.losses import Output, recommendation_loss
from models.sasrec import SASRec
from utils import cli, processes
from utils.files import check_writable
from utils.flags import Data, DistillationLoss, PositiveInt, flag

DIM, SLOTS, BLOCKS = 128, 30, 4
PROMPT, RESPONSE = list(range(62)), list(range(62, 69))
SHAPES = BUILT_IN | {
    "llama-2-7b": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
    }
}
VOCABULARY = {"llama-2-7b": 32000}
# training h per epoch / inference h / trainable B / inference B; one A100, batches of 256 and 512
PAPER = {
    "E4SRec, 32 layers": "3.95 / 0.415 / 0.023 / 6.631",
    "E4SRec, 4 layers": "0.90 / 0.083 / 0.003 / 0.944",
    "SLMRec 4 <- 8": "0.60 / 0.052 / 0.003 / 0.944",
    "SASRec": "0.014 / 0.015 / 0.007 / 0.007",
}


class Setting(NamedTuple):
    """All that a row is built from; sent to the process that measures its memory."""

    csv: str
    shape: str
    batch_size: int
    eval_batch_size: int
    device: str


class Row(NamedTuple):
    """train takes micro-batches of sample indices, infer one batch; parameters as the paper counts
    them, decoder and embeddings with LoRA but without the adapters.
    """

    train: Callable[..., None]
    infer: Callable[[np.ndarray], Tensor]
    trained_parameters: int
    parameters: int


@functools.lru_cache(1)
def samples_of(setting: Setting) -> sequences.Samples:
    return sequences.training_samples(read_csv(setting.csv), "last", SLOTS)


def batches_of(setting: Setting, n: int, batch_size: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, len(samples_of(setting)), batch_size) for _ in range(n)]


def shape_of(setting: Setting) -> measure.Shape:
    config = LlamaConfig(
        **SHAPES[setting.shape],
        num_hidden_layers=32,
        vocab_size=VOCABULARY.get(setting.shape, 390),
        max_position_embeddings=4096,
        use_cache=False,
    )
    torch.manual_seed(0)
    table = (
        nn.Embedding(samples_of(setting).data.n_items, DIM)
        .weight.detach()
        .mul_(0.1)
        .to(setting.device)
    )
    return measure.Shape(config, PROMPT, RESPONSE, table, SLOTS)


def llm_row(setting: Setting, which: str, n_layers: int, distilled: bool) -> Row:
    """`which` is plain or ours; distilled: the whole loss against cached teacher states."""
    shape, samples, device = shape_of(setting), samples_of(setting), torch.device(setting.device)
    bf16 = device.type == "cuda"
    model = shape.model(n_layers, "lora", BLOCKS if distilled else 1, distilled, bf16)
    states = made_up_states(setting, shape) if distilled else None
    if which == "plain":
        model = plain.plain_twin(model, (measure.RANK, measure.RANK, measure.TARGETS))[0]

    def loss(rows):
        history, target = samples.histories(rows), samples.targets(rows).to(device)
        if which == "plain":
            return plain.plain_loss(model(history), None, model.item_table, target)
        if not distilled:
            return catalogue_cross_entropy(model(history).user, model.item_table, target)
        outputs = model(history), Output(*states(rows))
        loss = recommendation_loss(*outputs, model.item_table, target, DistillationLoss())
        return loss["total"]

    @torch.no_grad()
    def plain_encode(history):
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            return model.eval()(history).user

    @functools.cache
    def encoder():  # made when first asked: the prompt, once
        return plain_encode if which == "plain" else model.user_encoder(bf16)

    decoder = model.llama if which == "plain" else model.decoder
    sizes = [(p.numel(), p.requires_grad) for p in decoder.parameters()]
    return Row(
        training_step(model, loss, bf16),
        lambda rows: encoder()(samples.histories(rows)),
        sum(n for n, trained in sizes if trained),
        sum(n for n, _ in sizes),
    )


def made_up_states(setting: Setting, shape: measure.Shape) -> Callable[[np.ndarray], list[Tensor]]:
    """Random states of a teacher on the timed samples, read through memory-mapped files as
    distill.py does.
    """
    samples = samples_of(setting)
    folder = tempfile.TemporaryDirectory()
    every = np.arange(min(len(samples), 64 * setting.batch_size))
    end, length = samples.end[every], samples.length[every]
    part = dataclasses.replace(samples, end=end, length=length)
    width = shape.config.hidden_size

    def encode(history):
        n = len(history)
        return torch.randn(n, DIM), torch.randn(n, BLOCKS, width), torch.empty(n, 0, DIM)

    states = teacher_states.open_or_build(Path(folder.name), {}, lambda: encode, part, 4096)

    def read(rows: np.ndarray, keep_alive=folder) -> list[Tensor]:
        return states.rows(rows % len(every), torch.device(setting.device))

    return read


def sasrec_row(setting: Setting) -> Row:
    samples, device = samples_of(setting), torch.device(setting.device)
    torch.manual_seed(0)
    model = SASRec(
        samples.data.n_items,
        SLOTS,
        emb_dim=DIM,
        hid_dim=32,
        num_blocks=2,
        num_heads=1,
        dropout=0.5,
        norm="query",
        init_std=0.02,
    ).to(device)

    def loss(rows):
        targets = samples.shifted_targets(rows).to(device)
        real = targets != samples.data.n_items
        return catalogue_cross_entropy(
            model.states(samples.histories(rows).to(device))[real], model.item_table, targets[real]
        )

    @torch.no_grad()
    def infer(rows):
        return model.eval()(samples.histories(rows).to(device))

    size = sum(p.numel() for p in model.parameters())
    return Row(training_step(model, loss), infer, size, size)


ROWS: dict[str, Callable[[Setting], Row]] = {}
for _which in ("plain", "ours"):
    for _n in (32, 8, 4):
        _row = functools.partial(llm_row, which=_which, n_layers=_n, distilled=False)
        ROWS[f"E4SRec, {_n} layers, {_which}"] = _row
ROWS |= {
    "SLMRec 4 <- 8, ours": functools.partial(llm_row, which="ours", n_layers=4, distilled=True),
    "SASRec, ours": sasrec_row,
}


def prepare_training(name: str, setting: Setting, micro: int) -> Callable[[], None]:
    """For measure.peak_memory: two training steps, so that the optimizer's state is there."""
    row = ROWS[name](setting)
    return lambda: [
        row.train(*_micro_batches(rows, micro))
        for rows in batches_of(setting, 2, setting.batch_size)
    ]


def _micro_batches(rows: np.ndarray, micro: int) -> list[np.ndarray]:
    return [rows[i : i + micro] for i in range(0, len(rows), micro)]


def timed_round(name: str, setting: Setting, micro: int, number: int) -> tuple[float, float, Row]:
    """Seconds of a training step and of an inference batch, each after one that warms up."""
    row, device = ROWS[name](setting), torch.device(setting.device)
    for rows in batches_of(setting, number + 2, setting.batch_size)[number:]:
        step = seconds(lambda: row.train(*_micro_batches(rows, micro)), device)
    for rows in batches_of(setting, number + 2, setting.eval_batch_size)[number:]:
        infer = seconds(
            lambda: [
                row.infer(part) for part in _micro_batches(rows, max(micro, setting.batch_size))
            ],
            device,
        )
    return step, infer, row._replace(train=None, infer=None)


def fitting_micro_batch(name: str, setting: Setting) -> tuple[int, int | None]:
    """The largest halving of the batch that a training step has memory for, and the bytes it takes;
    None: not even one user.
    """
    micro = setting.batch_size
    while True:
        peak = measure.peak_memory(
            prepare_training,
            name,
            setting,
            micro,
            device=torch.device(setting.device),
            with_preparation=True,
        )
        if peak is not None or micro == 1:
            return micro, peak
        micro //= 2


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
    """Print the paper's efficiency table at a shape, and the ratios to the 32-layer model.

    Sequence lengths and the catalogue are the domain's.
    """
    names = [name for name in ROWS if rows == ["all"] or name.startswith(tuple(rows))]
    unknown = [text for text in rows if not any(name.startswith(text) for name in ROWS)]
    expected = f"expected all, or beginnings of {'; '.join(ROWS)}"
    cli.check((rows == ["all"] or not unknown, f"--rows={','.join(unknown)}: {expected}"))
    folder = Path(output_dir)
    check_writable(folder, "--output_dir")
    _, csv = Domain.of(data).read()
    device = processes.choose_device(device)
    setting = Setting(str(csv), shape, batch_size, eval_batch_size, device.type)
    lengths = samples_of(setting).lengths()
    n, padded = len(lengths), len(PROMPT) + SLOTS + len(RESPONSE)
    mean = round(float(lengths.mean()), 2)
    computed = len(PROMPT) + batch_size * (mean + len(RESPONSE))
    about = measure.machine(device) | setting._asdict()
    about |= {
        "samples": n,
        "repeats": repeats,
        "prompt": len(PROMPT),
        "response": len(RESPONSE),
        "mean_history": mean,
        "token_ratio": round(padded * batch_size / computed, 2),
    }
    print("  ".join(f"{name} {value}" for name, value in about.items()), flush=True)
    fits = {name: fitting_micro_batch(name, setting) for name in names}
    about["rows"] = {
        name: {"micro_batch_size": micro, "peak_bytes": peak}
        for name, (micro, peak) in fits.items()
    }
    times: dict[str, list] = {name: [] for name, (_, peak) in fits.items() if peak is not None}
    for i in range(repeats):
        for name in times:
            *spent, row = timed_round(name, setting, fits[name][0], i)
            times[name].append(spent)
            about["rows"][name] |= {
                "trained_parameters": row.trained_parameters,
                "parameters": row.parameters,
            }
            print(
                f"{name:28s} step of {batch_size} {spent[0]:8.3f} s  inference of "
                f"{eval_batch_size} {spent[1]:8.3f} s",
                flush=True,
            )
            gc.collect()
    for name in times:
        step, infer = np.median(np.array(times[name]), axis=0)
        is_llm = not name.startswith("SASRec")
        about["rows"][name] |= {
            "step_seconds": step,
            "train_seconds_per_epoch": step * n / batch_size,
            "inference_seconds": infer * n / eval_batch_size,
            "padded_tokens_per_second": batch_size * padded / step if is_llm else None,
        }
    about["ratios"] = ratios(times, batch_size / eval_batch_size)
    measure.write_report(folder, "efficiency", about, table(about))
    return about


def ratios(times: dict[str, list], share: float) -> dict[str, list[float]]:
    """32 layers over SLMRec, training and inference, the median of the rounds' ratios; the
    comparisons kept apart.

    Args:
        share: training batch over inference batch, to add the pass that fills the cache of teacher
            states to a training step.
    """
    seconds_of = {name: np.array(rounds) for name, rounds in times.items()}
    large, small, filling = "E4SRec, 32 layers", "SLMRec 4 <- 8, ours", "E4SRec, 8 layers, ours"
    if (
        small in times and filling in times
    ):  # the first epoch: every sample is once inferred by the teacher
        seconds_of["first epoch"] = seconds_of[small] + np.outer(
            seconds_of[filling][:, 1] * share, [1.0, 0.0]
        )
    compared = {
        "plain / plain, pruning alone": (f"{large}, plain", "E4SRec, 4 layers, plain"),
        "ours / ours, pruning and distillation": (f"{large}, ours", small),
        "plain / ours, all": (f"{large}, plain", small),
        "plain / ours, all, the epoch that fills the teacher's cache": (
            f"{large}, plain",
            "first epoch",
        ),
        "plain / ours, without distillation": (f"{large}, plain", "E4SRec, 4 layers, ours"),
    }
    found = {}
    for label, (one, other) in compared.items():
        if one in seconds_of and other in seconds_of:
            found[label] = np.median(seconds_of[one] / seconds_of[other], axis=0).tolist()
    return found


def table(about: dict) -> str:
    """Markdown: the rows, then the ratios beside the paper's."""
    lines = [
        "| row | train s / epoch | inference s | trained M | inference M | peak MiB | padded "
        "tokens / s | paper: h / h / B / B |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in about["rows"].items():
        paper = PAPER.get(name.rpartition(", ")[0], "-")
        if row["peak_bytes"] is None:
            lines.append(f"| {name} | out of memory | - | - | - | - | - | {paper} |")
            continue
        rate = f"{row['padded_tokens_per_second']:,.0f}" if row["padded_tokens_per_second"] else "-"
        lines.append(
            f"| {name} | {row['train_seconds_per_epoch']:,.1f} | {row['inference_seconds']:,.1f} "
            f"| {row['trained_parameters'] / 1e6:,.2f} |"
            f" {row['parameters'] / 1e6:,.2f} | {row['peak_bytes'] / 2**20:,.0f} | {rate} | "
            f"{paper} |"
        )
    if about["ratios"]:
        lines += ["", "| 32 layers over 4 | train | inference |", "|---|---|---|"]
        lines += [
            f"| {label} | {train:.1f}x | {infer:.1f}x |"
            for label, (train, infer) in about["ratios"].items()
        ]
        lines += ["| the paper, one A100 | 6.6x | 8.0x |"]
    return "\n".join(lines)


if __name__ == "__main__":
    cli.run(main)
