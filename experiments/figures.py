"""The report's figures."""

import math
import textwrap
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from engine.log import SPEED, events
from experiments.results import Row

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PANELS = (("sampled", "MRR"), ("sampled", "HR@10"), ("full", "NDCG@10"))
NEAR = 0.8  # of the best row
COLOURED = 8  # curves that can be told apart
PARTS = {
    "ce": "cross-entropy",
    "align_cos": "1 - cosine, as added over blocks",
    "align_norm": "distance, as added over blocks",
    "exits": "cross-entropy, as added over exits",
    "logit_kl": "logit KL",
    "sasrec_kl": "SASRec's KL",
    "teacher_ce": "teacher's cross-entropy",
}
NO_PARTS = ("event", "step", "learning_rate", "grad_norm", "epoch", "teacher_exits", *SPEED)
Series = dict[str, dict[str, tuple[list, list]]]  # panel -> row's label -> steps and values


def metrics(rows: list[Row], path: Path, title: str, popularity: dict | None, smoke: bool) -> Path:
    """A dot per row, a whisker for the standard deviation over seeds, small dots for the seeds.

    An axis spans the rows near the best one, so that they can be distinguished, and says where it
    begins. A row further below stands at its left edge with its value, popularity too.
    """
    size = (16, 1.6 + 0.45 * (len(rows) + 1))
    fig, axes = plt.subplots(1, len(PANELS), figsize=size, sharey=True, layout="constrained")
    tests = [[run.results["test"] for run in row.runs.values()] for row in rows]
    tests += [[popularity]] if popularity else []
    counts = rows[0].first.results.get("candidates", {})
    for ax, (protocol, name) in zip(axes, PANELS):
        begins = _dots(ax, [[test[protocol][name] for test in of_row] for of_row in tests])
        candidates = f"1 + {counts.get('fewest', 999)} candidates"
        candidates = candidates if protocol == "sampled" else "whole catalogue"
        ax.set_xlabel(f"{name}, axis from {begins:.4f}\n{candidates}")
        ax.grid(axis="x", alpha=0.3)
        ax.locator_params(axis="x", nbins=4)
    labels = [row.label for row in rows] + ["popularity"] * bool(popularity)
    axes[0].set_yticks(range(len(labels)), [textwrap.fill(label, 60) for label in labels])
    axes[0].set_ylim(len(labels) - 0.5, -0.5)
    several = any(len(row.runs) > 1 for row in rows)
    fig.suptitle(title + "; whiskers: standard deviation over seeds" * several)
    return _save(fig, path, smoke)


def _dots(ax: Any, values: list[list[float]]) -> float:
    """One panel of `metrics`, a line per row; where its axis begins."""
    means = np.array([np.mean(of_row) for of_row in values])
    near = means >= NEAR * means.max()
    if near.mean() < 0.5:  # too few of them to be worth an axis
        near = means >= 0
    width = max(np.ptp(means[near]), 0.01 * means.max(), 1e-4)
    left = max(0.0, means[near].min() - 0.25 * width)
    for y, (of_row, mean) in enumerate(zip(values, means)):
        if not near[y]:
            ax.plot(left, y, "<", color="C3", markersize=6, clip_on=False)
            text = {"xytext": (7, 0), "textcoords": "offset points", "va": "center"}
            ax.annotate(f"{mean:.4f}", (left, y), fontsize=8, color="C3", **text)
            continue
        ax.plot(of_row, [y] * len(of_row), "o", color="0.7", markersize=4)
        spread = np.std(of_row, ddof=1) if len(of_row) > 1 else None
        ax.errorbar(mean, y, xerr=spread, fmt="o", color="C0", capsize=3)
    ax.set_xlim(left, max(map(max, values)) + 0.35 * width)
    return left


def curves(rows: list[Row], path: Path, title: str, smoke: bool) -> Path:
    """Loss parts and validation MRR against optimizer steps, of each row's first seed. The
    first COLOURED rows have colours, the others are grey.
    """
    series = _series(rows)
    order = dict.fromkeys(["valid MRR", *PARTS, *series])
    names = [name for name in order if name in series] or ["valid MRR"]
    columns = min(3, len(names))
    lines = math.ceil(len(names) / columns)
    size = (4.6 * columns, 3.2 * lines + 0.4)
    fig, axes = plt.subplots(lines, columns, figsize=size, squeeze=False)
    styles = {}
    for i, row in enumerate(rows):
        front = {"color": f"C{i}", "zorder": 3}
        styles[row.label] = front if i < COLOURED else {"color": "0.8", "zorder": 1}
    for ax, name in zip(axes.flat, names):
        for text, (steps, points) in series.get(name, {}).items():
            marker = "." if len(points) < 20 else ""
            ax.plot(steps, points, **styles[text], marker=marker, linewidth=1.2)
        ax.set_title(PARTS.get(name, "validation" if name == "valid MRR" else name), fontsize=10)
        ax.set_ylabel("sampled MRR" if name == "valid MRR" else "loss")
        ax.set_xlabel("optimizer steps")
        ax.grid(alpha=0.3)
    for ax in axes.flat[len(names) :]:
        ax.set_axis_off()
    handles = []
    for row in rows[:COLOURED]:
        text = f"{row.label}, seed {row.first.seed}"
        handles.append(plt.Line2D([], [], label=text, **styles[row.label]))
    if rows[COLOURED:]:
        text = f"{len(rows) - COLOURED} other rows"
        handles.append(plt.Line2D([], [], label=text, color="0.8"))
    fig.suptitle(title)
    fig.tight_layout()
    below = {"loc": "upper center", "bbox_to_anchor": (0.5, 0), "ncol": 3}
    fig.legend(handles=handles, fontsize=8, frameon=False, **below)
    return _save(fig, path, smoke)


def _series(rows: list[Row]) -> Series:
    series: Series = {}
    for row in rows:
        run = row.first
        for event in events(run.folder / "metrics.jsonl"):
            values = {name: event[name] for name in event if name not in NO_PARTS}
            if event["event"] == "valid":
                values = {"valid MRR": event.get("sampled/MRR")}
            else:  # SASRec's only part is its cross-entropy
                total = values.pop("total", None)
                values |= {"ce": total} if run.config["step"] == "sasrec" else {}
            for name, value in values.items():
                if value is not None:
                    steps, points = series.setdefault(name, {}).setdefault(row.label, ([], []))
                    steps.append(event["step"])
                    points.append(value)
    return series


def _save(fig: Any, path: Path, smoke: bool) -> Path:
    """As PNG, and beside it as PDF."""
    if smoke:
        text = {"ha": "center", "va": "center", "rotation": 20, "color": "0.7", "alpha": 0.6}
        fig.text(0.5, 0.5, "smoke run: figures mean nothing", fontsize=32, zorder=9, **text)
    options = {"bbox_inches": "tight"}
    fig.savefig(path, dpi=110, metadata={"Software": None}, **options)
    fig.savefig(path.with_suffix(".pdf"), metadata={"CreationDate": None}, **options)
    plt.close(fig)
    return path
