import math
from math import log2

import numpy as np
import pytest

from utils.metrics import beyond_accuracy, summarise


def test_metrics_are_the_fractions_worked_out_by_hand():
    metrics = summarise(np.array([1, 2, 10, 11]), cutoffs=(5, 10))  # a cut-off counts itself
    expected = {
        "HR@1": 1 / 4,
        "HR@5": 2 / 4,
        "HR@10": 3 / 4,
        "NDCG@5": (1 + 1 / log2(3)) / 4,
        "NDCG@10": (1 + 1 / log2(3) + 1 / log2(11)) / 4,
        "MRR": (1 + 1 / 2 + 1 / 10 + 1 / 11) / 4,
    }
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, abs=1e-15)


def test_what_lists_hold_beside_the_targets_by_hand():
    """Interactions 2, 6, 2, 1, 1: item 1 alone is the first third; two lists of two places."""
    counts = np.array([2, 6, 2, 1, 1])
    shown = np.array([1, 2, 0, 1, 0])
    found = beyond_accuracy(shown, counts, np.array([1, 11, 3]), np.array([1, 0, 4]))
    bits = [-math.log2(2 / 12), -math.log2(6 / 12), -math.log2(1 / 12)]
    assert found == pytest.approx(
        {
            "coverage@10": 3 / 5,
            "novelty@10": (bits[0] + 2 * bits[1] + bits[2]) / 4,
            "long_tail@10": 2 / 4,  # item 1 alone is the most popular fifth
            "head HR@10": 1.0,  # item 1, found at 1
            "middle HR@10": 0.0,  # item 0, found at 11
            "tail HR@10": 1.0,  # item 4, found at 3
        },
        abs=1e-6,
    )
