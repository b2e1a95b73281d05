"""Whether two rows differ: a paired bootstrap over users."""

import numpy as np

from experiments.found import Row, Run
from experiments.rows import plain_ce, plain_name

SAME_CANDIDATES = ("num_candidates", "candidate_seed")
CHUNK = 2**24  # resampled users held at once


HEAD = ["row", "against", "sampled MRR", "95 % interval", "p", "full MRR", "95 % interval", "p", "seeds"]


def compare(rows: list[Row], resamples: int, notes: list[str]) -> list[list[str]]:
    """Lines of HEAD's table: every row against SASRec, cross-entropy alone against its deepest, the others against their depth's
    cross-entropy alone, their teacher, and SLMRec and D_cos of their depths. Pairs that cannot be compared are added to the notes."""
    by_label, lines = {row.label: row for row in rows}, []
    for row in rows:
        for other in _references(row, by_label):
            pairs = [(row.runs[seed], by_label[other].runs[seed]) for seed in row.runs if seed in by_label[other].runs]
            problems = [problem for pair in pairs if (problem := _incomparable(*pair))] if pairs else ["no seed in common"]
            notes += [f"{row.label} against {other}: {problem}" for problem in problems[:1]]
            if not problems:
                cells = [_comparison(pairs, protocol, resamples) for protocol in ("sampled", "full")]
                lines.append([row.label, other, *cells[0], *cells[1], ", ".join(str(mine.seed) for mine, _ in pairs)])
    return lines


def _references(row: Row, by_label: dict[str, Row]) -> list[str]:
    run = row.first
    step, flags, wanted = run.step, run.flags, ["SASRec"]
    targets = ", every prefix" if step != "sasrec" and flags["train_targets"] == "all" else ""
    if step != "sasrec" and plain_ce(step, flags):
        depths = [_layers(other.first) for other in by_label.values() if other.first.step != "sasrec" and plain_ce(other.first.step, other.first.flags)]
        wanted += [plain_name(max(depths)) + targets, plain_name(_layers(run))]
    elif step != "sasrec":
        between = f"{_layers(run)} <- {flags.get('llama_decoder_nums_teacher')}"
        wanted.append(plain_name(_layers(run)) + targets)
        wanted += [text for text, other in by_label.items() if any(map(run.taught_by, other.runs.values()))]
        wanted += [f"SLMRec {between}", f"{between}: D_cos"]
    return [text for text in dict.fromkeys(wanted) if text in by_label and text != row.label]


def _layers(run: Run) -> int:
    return run.flags.get("llama_decoder_nums_student") or run.flags["llama_decoder_nums"]


def _incomparable(mine: Run, theirs: Run) -> str:
    """Why two runs of a seed cannot be paired; empty where they can."""
    if any(mine.flags[name] != theirs.flags[name] for name in SAME_CANDIDATES):
        return "other candidates"
    if "sasrec" not in (mine.step, theirs.step) and mine.config.get("table_sha256") != theirs.config.get("table_sha256"):
        return f"{mine.name} and {theirs.name} stand on different item tables"
    ranks = [run.ranks(protocol) for run in (mine, theirs) for protocol in ("sampled", "full")]
    whole = all(values is not None for values in ranks) and len({len(values) for values in ranks}) == 1
    return "" if whole else f"ranks.npz of {mine.name} or {theirs.name} is missing or torn"


def _comparison(pairs: list[tuple[Run, Run]], protocol: str, resamples: int) -> list[str]:
    """Difference, interval and p."""
    difference = np.mean([1 / mine.ranks(protocol) - 1 / theirs.ranks(protocol) for mine, theirs in pairs], axis=0)
    mean, low, high, p = paired_bootstrap(difference, resamples)
    return [f"{mean:+.4f}", f"{low:+.4f} to {high:+.4f}", f"{p:.4f}"]


def paired_bootstrap(difference: np.ndarray, resamples: int, seed: int = 0) -> tuple[float, float, float, float]:
    """Mean, 95 % percentile interval and two-sided p of a paired difference [U] (Efron and Tibshirani, 1993, ch. 13 and 16).

    p is twice the smaller share of resampled means on either side of zero, the sample itself counted among them, so that
    it is never 0 (Davison and Hinkley, 1997, ch. 4).
    """
    rng = np.random.default_rng(seed)
    means = []
    for start in range(0, resamples, max(1, CHUNK // len(difference))):
        n = min(resamples - start, max(1, CHUNK // len(difference)))
        means.append(difference[rng.integers(0, len(difference), (n, len(difference)), dtype=np.int32)].mean(1))
    drawn = np.concatenate(means)
    low, high = np.quantile(drawn, [0.025, 0.975])
    p = min(1.0, 2 * (1 + min((drawn <= 0).sum(), (drawn >= 0).sum())) / (resamples + 1))
    return float(difference.mean()), float(low), float(high), float(p)
