"""The report's and the motivational experiment's figures."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np

from utils.metrics_log import parsed_event

matplotlib.use("Agg")
import matplotlib.pyplot as plt

if TYPE_CHECKING:
    from experiments.found import Row

PANELS = (("sampled", "MRR"), ("sampled", "HR@10"), ("full", "NDCG@10"))
NEAR = 0.8  # of the best row
PARTS = {
    "ce": "cross-entropy", "align_cos": "1 - cosine, as added over blocks", "align_norm": "distance, as added over blocks",
    "exits": "cross-entropy, as added over exits",
    "logit_kl": "logit KL", "teacher_ce": "teacher's cross-entropy", "total": "total (SASRec: cross-entropy)",
}  # fmt: skip


def metrics(rows: "list[Row]", path: Path) -> Path:
    """A dot a row, a whisker for the standard deviation over seeds, small dots for the seeds.

    An axis spans the rows near the best one, so that they are told apart; one further below stands at its left edge with its value.
    """
    fig, axes = plt.subplots(1, len(PANELS), figsize=(12, 1.2 + 0.34 * len(rows)), sharey=True, layout="constrained")
    for ax, (protocol, name) in zip(axes, PANELS):
        values = [[run.results["test"][protocol][name] for run in row.runs.values()] for row in rows]
        means = np.array([np.mean(of_row) for of_row in values])
        near = means >= NEAR * means.max()
        left = means[near].min() - 0.12 * max(np.ptp(means[near]), 0.01 * means.max())
        for y, (of_row, mean) in enumerate(zip(values, means)):
            if not near[y]:
                ax.plot(left, y, "<", color="C3", markersize=6)
                ax.annotate(f"{mean:.4f}", (left, y), xytext=(7, 0), textcoords="offset points", va="center", fontsize=8, color="C3")
                continue
            ax.plot(of_row, [y] * len(of_row), "o", color="0.7", markersize=4)
            ax.errorbar(mean, y, xerr=np.std(of_row, ddof=1) if len(of_row) > 1 else None, fmt="o", color="C0", capsize=3)
        ax.set_xlabel(f"{name}, {'1 + 999 candidates' if protocol == 'sampled' else 'whole catalogue'}")
        ax.grid(axis="x", alpha=0.3)
        ax.locator_params(axis="x", nbins=5)
    axes[0].set_yticks(range(len(rows)), [row.label for row in rows])
    axes[0].invert_yaxis()
    return _save(fig, path)


def curves(rows: "list[Row]", path: Path) -> Path:
    """Every part of the loss and the validation MRR against optimizer steps, of each row's first seed."""
    series: dict[str, dict[str, tuple[list, list]]] = {}
    for row in rows:
        run = row.first
        for event in _log(run.folder / "metrics.jsonl"):
            values = {"valid MRR": event.get("sampled/MRR")} if event["event"] == "valid" else {name: event.get(name) for name in PARTS}
            for name, value in values.items():
                if value is not None and not (name == "total" and run.config["step"] != "sasrec"):
                    steps, points = series.setdefault(name, {}).setdefault(row.label, ([], []))
                    steps.append(event["step"] / max(1, run.results["steps"]))
                    points.append(value)
    names = ["valid MRR", *[name for name in PARTS if name in series]]
    names = [name for name in names if name in series]
    if not names:
        names, series = ["valid MRR"], {"valid MRR": {}}
    columns = min(3, len(names))
    fig, axes = plt.subplots(math.ceil(len(names) / columns), columns, figsize=(4.6 * columns, 3.2 * math.ceil(len(names) / columns)), squeeze=False)
    styles = {row.label: {"color": f"C{i % 10}", "linestyle": ("-", "--", ":")[i // 10 % 3]} for i, row in enumerate(rows)}
    for ax, name in zip(axes.flat, names):
        for text, (steps, points) in series[name].items():
            ax.plot(steps, points, **styles[text], marker="." if len(points) < 20 else "", linewidth=1.2)
        ax.set_title(PARTS.get(name, "validation MRR, 1 + 999 candidates"), fontsize=10)
        ax.set_xlabel("share of the run's steps")
        ax.grid(alpha=0.3)
    for ax in axes.flat[len(names) :]:
        ax.set_axis_off()
    handles = [plt.Line2D([], [], label=f"{row.label}, seed {row.first.seed}", **styles[row.label]) for row in rows]
    fig.tight_layout()
    per_row = 3
    fig.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, 0), ncol=per_row, fontsize=8, frameon=False)
    return _save(fig, path)


def motivation(points: list[dict[str, Any]], band: dict[str, tuple[float, float, float]], paper: dict[int, tuple] | None, path: Path) -> Path:
    """Fig. 2: metrics against the number of layers, trained with so many (top) and read off after so many (bottom).

    Args:
        points: rows of motivation.csv, with part, layers, and a value a metric.
        band: metric -> SASRec's (mean, low, high). paper: layers -> HR@10, NDCG@10, MRR of the paper's cloth.
    """
    names = list(band)
    fig, axes = plt.subplots(2, len(names), figsize=(4.4 * len(names), 6.6), layout="constrained")
    lines = {  # the two of the lower half may lie on each other: a wide line below, a thin one above
        "trained": {"label": "trained with the first N layers", "color": "C0"},
        "raw": {"label": "states as they are", "color": "C1", "linewidth": 5, "markersize": 10, "alpha": 0.5},
        "normed": {"label": "states through the final norm", "color": "C2", "linestyle": "--", "markersize": 4},
    }
    for column, name in enumerate(names):
        for line, parts in enumerate((("trained",), ("raw", "normed"))):
            ax, (mean, low, high) = axes[line, column], band[name]
            ax.axhspan(low, high, color="0.85")
            ax.axhline(mean, color="0.5", linewidth=1, label="SASRec, 95 % over users (unpaired)")
            for part in parts:
                mine = [point for point in points if point["part"] == part]
                layers = sorted({point["layers"] for point in mine})
                values = [[point[name] for point in mine if point["layers"] == n] for n in layers]
                errors = [np.std(v, ddof=1) if len(v) > 1 else 0.0 for v in values]
                ax.errorbar(layers, [np.mean(v) for v in values], yerr=errors, marker="o", capsize=3, **lines[part])
            if paper and not line:
                at = list(paper)
                ax.plot(at, [paper[n][column] for n in at], "k--", marker="x", label="the paper's (cloth, LLaMA)")
            ax.set_xticks(layers)
            ax.set_xlabel("N, layers trained" if not line else "layer after which users are scored")
            ax.set_ylabel(f"{name}, 1 + 999 candidates")
            ax.grid(alpha=0.3)
    axes[0, 0].legend(fontsize=8)
    axes[1, 0].legend(fontsize=8)
    return _save(fig, path)


def _log(path: Path) -> list[dict[str, Any]]:
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return [event for line in lines if (event := parsed_event(line)) is not None]


def _save(fig: Any, path: Path) -> Path:
    fig.savefig(path, dpi=110, bbox_inches="tight", metadata={"Software": None})
    plt.close(fig)
    return path
