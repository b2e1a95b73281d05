import numpy as np
import pytest
import torch

from datasets.interactions import read_csv
from datasets.sequences import TEST, VALID, EvaluationSplit
from engine.errors import RunError
from tests.conftest import write_sequences
from utils import evaluation
from utils.evaluation import rank_all


@pytest.fixture
def data(tmp_path):
    rng = np.random.default_rng(5)
    # with repeats
    sequences = [rng.integers(0, 40, size=rng.integers(4, 12)).tolist() for _ in range(30)]
    return read_csv(write_sequences(tmp_path / "d.csv", sequences))


def naive_ranks(data, split, scores, candidates):
    """The protocols in plain Python, a user at a time."""
    found = []
    for user in range(data.n_users):
        items = data.items[data.offsets[user] : data.offsets[user + 1]].tolist()
        target, history, s = items[-split], set(items[:-split]), scores[user].tolist()
        others = [i for i in range(data.n_items) if i != target]
        sampled = 1 + sum(s[i] >= s[target] for i in candidates[user] if i >= 0)
        full = 1 + sum(s[i] >= s[target] for i in others if i not in history)
        full_all = 1 + sum(s[i] >= s[target] for i in others)
        found.append((sampled, full, full_all))
    return np.array(found).T


@pytest.mark.parametrize("split", [VALID, TEST])
@pytest.mark.parametrize("tile, batch_size", [(1, 1), (100, 7), (2**24, 30)])
def test_ranks_equal_a_naive_loop_with_ties_and_repeats(data, split, tile, batch_size, monkeypatch):
    monkeypatch.setattr(evaluation, "CPU_TILE", tile)
    torch.manual_seed(0)
    table = torch.randn(data.n_items, 4).round()  # rounded: many ties
    view = EvaluationSplit(data, split, max_seq_length=5, seed=3, n_candidates=15)

    def encode(history):
        return torch.stack([table[h[h < data.n_items]].sum(0) for h in history])

    ranks = rank_all(encode, table, view.batches(batch_size))
    vectors = torch.cat([encode(batch.history) for batch in view.batches(30)])
    expected = naive_ranks(data, split, vectors @ table.T, view.candidates(np.arange(data.n_users)))
    assert np.array_equal(np.stack(ranks), expected)


def test_a_constant_model_scores_nothing(data):
    view = EvaluationSplit(data, TEST, 5, seed=3, n_candidates=15)
    table = torch.ones(data.n_items, 4)
    ranks = rank_all(lambda history: torch.zeros(len(history), 4), table, view.batches(8))
    for metrics in ranks.metrics().values():
        assert {value for name, value in metrics.items() if name != "MRR"} == {0.0}
    assert (ranks.sampled == 16).all()
    assert (ranks.full_all == data.n_items).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_scores_are_an_error_not_a_perfect_rank(data, bad):
    view = EvaluationSplit(data, TEST, 5, seed=3, n_candidates=15)
    with pytest.raises(RunError, match="not finite|NaN"):
        table = torch.ones(data.n_items, 4)
        rank_all(lambda history: torch.full((len(history), 4), bad), table, view.batches(8))


@pytest.mark.parametrize("tile, longest", [(1, 12), (2**24, 12), (9, 40)])
def test_how_often_an_item_is_in_a_list_equals_a_sorted_loop(tmp_path, tile, longest, monkeypatch):
    """Lists leave the history out, but not the target: of 38 items read they have two."""
    monkeypatch.setattr(evaluation, "CPU_TILE", tile)
    rng = np.random.default_rng(5)
    rows = [rng.permutation(40)[: rng.integers(4, longest)].tolist() for _ in range(30)]
    data = read_csv(write_sequences(tmp_path / "d.csv", [*rows, [*range(40)]]))
    split = EvaluationSplit(data, TEST, 8, 0, 5)
    table = torch.randn(data.n_items, data.n_users, generator=torch.Generator().manual_seed(1))
    shown = torch.zeros(data.n_items, dtype=torch.int64)
    users = iter(torch.eye(data.n_users).split(7))
    rank_all(lambda history: next(users), table, split.batches(7), shown)
    expected = np.zeros(data.n_items, dtype=np.int64)
    for user in range(data.n_users):
        *history, target = data.items[data.offsets[user] : data.offsets[user + 1]].tolist()
        left = [item for item in range(data.n_items) if item not in history or item == target]
        left.sort(key=lambda item: -float(table[item, user]))
        expected[left[:10]] += 1
    assert shown.tolist() == expected.tolist()
