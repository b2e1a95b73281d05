"""Ranking metrics as pure functions of ranks (1 = best)."""

import numpy as np


def hit_rate(ranks: np.ndarray, k: int) -> float:
    """Share of users whose target stands among the first k."""
    return float(np.mean(ranks <= k))


def ndcg(ranks: np.ndarray, k: int) -> float:
    """NDCG@k with one relevant item: 1 / log2(1 + rank) where rank <= k, else 0."""
    return float(np.mean(np.where(ranks <= k, 1.0 / np.log2(1.0 + ranks), 0.0)))


def mean_reciprocal_rank(ranks: np.ndarray) -> float:
    """MRR over all that was ranked, without a cut-off."""
    return float(np.mean(1.0 / ranks))


def summarise(ranks: np.ndarray, cutoffs: tuple[int, ...] = (5, 10)) -> dict[str, float]:
    """HR@1, HR@k and NDCG@k for every cut-off, and MRR, of ranks [U] >= 1."""
    metrics = {"HR@1": hit_rate(ranks, 1)}
    metrics |= {f"HR@{k}": hit_rate(ranks, k) for k in cutoffs}
    metrics |= {f"NDCG@{k}": ndcg(ranks, k) for k in cutoffs}
    return metrics | {"MRR": mean_reciprocal_rank(ranks)}
