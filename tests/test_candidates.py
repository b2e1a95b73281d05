import numpy as np
import pytest

from datasets.candidates import draw, uniform
from datasets.interactions import read_csv
from datasets.sequences import TEST, VALID, EvaluationSplit
from tests.conftest import write_sequences


def drawn(rows, met=((),), n_items=50, k=20, key=(7, 1)):
    owner = np.array([i for i, items in enumerate(met) for _ in items], dtype=np.int64)
    items = np.array([item for items in met for item in items], dtype=np.int64)
    return draw(key, np.array(rows), owner, items, n_items, k)


def test_the_draw_is_pinned():
    """A literal: the same on every machine, in every version."""
    found = drawn([0, 1], met=((), (3, 4)), n_items=10, k=6).tolist()
    assert found == [[5, 1, 7, 6, 8, 9], [6, 2, 5, 0, 9, 1]]


def test_a_row_depends_on_key_and_row_number_alone():
    met = [(1,), (2,), (3,), (4,)]
    together = drawn([10, 11, 12, 13], met)
    for i in range(4):
        assert np.array_equal(drawn([10 + i], [met[i]])[0], together[i])
    assert not np.array_equal(drawn([10], key=(7, 1)), drawn([10], key=(7, 2)))
    assert not np.array_equal(drawn([10], key=(7, 1)), drawn([10], key=(8, 1)))
    assert not np.array_equal(drawn([10])[0], drawn([11])[0])


@pytest.mark.parametrize("n_items", [33, 64, 1000])
def test_every_item_is_drawn_equally_often(n_items):
    users, k = 6000, 10
    found = drawn(range(users), met=[()] * users, n_items=n_items, k=k)
    counts = np.bincount(found.ravel(), minlength=n_items)
    expected = users * k / n_items
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert abs(chi_square - n_items) < 5 * np.sqrt(2 * n_items)


def test_no_candidate_was_met_at_any_time_and_splits_differ(tmp_path):
    rng = np.random.default_rng(0)
    lists = [rng.permutation(60)[:8].tolist() for _ in range(20)]
    data = read_csv(write_sequences(tmp_path / "d.csv", lists))
    test = EvaluationSplit(data, TEST, 5, 42, 30).candidates(np.arange(20))
    valid = EvaluationSplit(data, VALID, 5, 42, 30).candidates(np.arange(20))
    for user in range(20):
        items = data.items[data.offsets[user] : data.offsets[user + 1]]
        assert not set(items) & set(test[user]) and not set(items) & set(valid[user])
    assert not np.array_equal(test, valid)


def test_a_dropped_short_user_does_not_shift_the_others(tmp_path):
    rng = np.random.default_rng(0)
    users = [rng.permutation(40)[:6].tolist() for _ in range(5)]
    # all its items occur elsewhere, so cutting it short leaves the catalogue as it is
    users[1] = users[0][::-1]
    whole = read_csv(write_sequences(tmp_path / "a.csv", users))
    short = read_csv(write_sequences(tmp_path / "b.csv", [users[0], users[1][:2], *users[2:]]))
    assert short.rows.tolist() == [0, 2, 3, 4]
    assert np.array_equal(short.item_ids, whole.item_ids)
    a = EvaluationSplit(whole, TEST, 5, 42, 10).candidates(np.array([2, 3, 4]))
    b = EvaluationSplit(short, TEST, 5, 42, 10).candidates(np.array([1, 2, 3]))
    assert np.array_equal(a, b)


@pytest.mark.parametrize("n_items", [1, 2, 3, 50, 64, 65, 700])
def test_the_draw_equals_a_plain_walk_over_the_order(n_items):
    """Item by item in each row's order, the first K that are in the catalogue and not met: K
    distinct ones, or all that is left, where 690 of 700 were met too.
    """
    from datasets.candidates import _keys, _permuted

    rng, k = np.random.default_rng(0), max(1, n_items // 3)
    met = [rng.integers(0, n_items, n * n_items // 700) for n in (0, 5, 300, 690, 1)]
    given = drawn(range(5), met=met, n_items=n_items, k=k)
    bits = max(1, (n_items - 1).bit_length())
    order = _permuted(_keys((7, 1), np.arange(5)), np.arange(1 << bits, dtype=np.uint32), bits)
    assert (np.sort(order, axis=1) == np.arange(1 << bits)).all()
    for row in range(5):
        walk = [int(item) for item in order[row] if item < n_items and item not in met[row]][:k]
        assert given[row].tolist() == walk + [-1] * (k - len(walk))


def test_uniform_draws_are_a_function_of_key_and_row_alone():
    """In any batch; another step draws others; every item is as likely."""
    rows = np.array([5, 0, 9])
    drawn = uniform((7, 3), rows, 11, 4000)
    assert drawn.shape == (3, 4000) and drawn.min() == 0 and drawn.max() == 10
    assert np.array_equal(uniform((7, 3), rows[[2, 0]], 11, 4000), drawn[[2, 0]])
    assert not np.array_equal(uniform((7, 4), rows, 11, 4000), drawn)
    counts = np.bincount(drawn.ravel(), minlength=11)
    assert ((counts - 12000 / 11) ** 2 / (12000 / 11)).sum() < 29.6  # chi-square, 10 freedoms, .001
