from math import log2

import numpy as np
import pytest

from utils.metrics import summarise


def test_metrics_are_the_fractions_worked_out_by_hand():
    metrics = summarise(np.array([1, 2, 7, 30]), cutoffs=(5, 10))
    assert metrics == pytest.approx(
        {
            "HR@1": 1 / 4,
            "HR@5": 2 / 4,
            "HR@10": 3 / 4,
            "NDCG@5": (1 + 1 / log2(3)) / 4,
            "NDCG@10": (1 + 1 / log2(3) + 1 / log2(8)) / 4,
            "MRR": (1 + 1 / 2 + 1 / 7 + 1 / 30) / 4,
        },
        abs=1e-15,
    )


def test_cut_off_is_inclusive():
    assert summarise(np.array([10]))["HR@10"] == 1.0
    assert summarise(np.array([11]))["HR@10"] == 0.0
    assert summarise(np.array([11]))["NDCG@10"] == 0.0
