"""Ranking metrics as pure functions of ranks (1 = best)."""

import numpy as np

TOP = 10  # items of the lists that `beyond_accuracy` looks at


def summarise(ranks: np.ndarray, cutoffs: tuple[int, ...] = (5, 10)) -> dict[str, float]:
    """HR@1, HR@k and NDCG@k for every cut-off, and MRR, of ranks [U] >= 1.

    HR: the share of users whose target stands among the first k. NDCG: with one relevant item, 1 /
    log2(1 + rank) where rank <= k, else 0. MRR: over all that was ranked, without a cut-off.
    """
    gain = 1.0 / np.log2(1.0 + ranks)
    metrics = {f"HR@{k}": np.mean(ranks <= k) for k in (1, *cutoffs)}
    metrics |= {f"NDCG@{k}": np.mean(np.where(ranks <= k, gain, 0.0)) for k in cutoffs}
    metrics |= {"MRR": np.mean(1.0 / ranks)}
    return {name: float(value) for name, value in metrics.items()}


def beyond_accuracy(
    shown: np.ndarray, counts: np.ndarray, ranks: np.ndarray, target: np.ndarray
) -> dict[str, float]:
    """What the lists of TOP items hold, beside the targets.

    coverage: the share of the catalogue that is in any list. novelty: the mean of -log2(p) over all
    places, p an item's share of the interactions, at least one (self-information; Zhou et al.,
    2010). long_tail: the share of places with an item that is not among the fifth most popular.
    HR of head, middle and tail: of the users whose target is among the most popular items that have
    a third of the interactions together, the next third, and the rest.

    Args:
        shown: in how many lists each item is, [N].
        counts: how often each item occurs before the targets, [N].
        ranks, target: of each user's target in the whole catalogue, and the item, [U].
    """
    order = np.argsort(-counts, kind="stable")
    before = np.cumsum(counts[order]) - counts[order]
    third = np.empty(len(counts), dtype=np.int64)
    third[order] = np.minimum(3 * before // max(1, counts.sum()), 2)
    in_tail = np.ones(len(counts), dtype=bool)
    in_tail[order[: len(order) // 5]] = False
    information = -np.log2(np.maximum(counts, 1) / max(1, counts.sum()))
    places = max(1, shown.sum())
    found = {
        f"coverage@{TOP}": (shown > 0).mean(),
        f"novelty@{TOP}": (shown * information).sum() / places,
        f"long_tail@{TOP}": shown[in_tail].sum() / places,
    }
    for number, name in enumerate(("head", "middle", "tail")):
        own = third[target] == number
        found[f"{name} HR@{TOP}"] = (ranks[own] <= TOP).mean() if own.any() else 0.0
    return {name: round(float(value), 6) for name, value in found.items()}
