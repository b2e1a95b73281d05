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
    assert drawn([0, 1], met=((), (3, 4)), n_items=10, k=6).tolist() == [
        [5, 1, 7, 6, 8, 9],
        [6, 2, 5, 0, 9, 1],
    ]


def test_candidates_are_distinct_in_range_and_never_met():
    met = [(0, 1, 2), (49,), (), (10, 20, 30)]
    for row, items in zip(drawn([5, 6, 7, 8], met), met):
        assert len(set(row)) == 20
        assert row.min() >= 0 and row.max() < 50
        assert not set(row) & set(items)


def test_a_row_depends_on_key_and_row_number_alone():
    met = [(1,), (2,), (3,), (4,)]
    together = drawn([10, 11, 12, 13], met)
    for i in range(4):
        assert np.array_equal(drawn([10 + i], [met[i]])[0], together[i])
    assert not np.array_equal(drawn([10], key=(7, 1)), drawn([10], key=(7, 2)))
    assert not np.array_equal(drawn([10], key=(7, 1)), drawn([10], key=(8, 1)))
    assert not np.array_equal(drawn([10])[0], drawn([11])[0])


def test_a_small_catalogue_gives_all_that_is_left():
    row = drawn([3], met=[(0, 5)], n_items=8, k=20)[0]
    assert sorted(row[row >= 0]) == [1, 2, 3, 4, 6, 7]
    assert (row == -1).sum() == 14


@pytest.mark.parametrize("n_items", [33, 64, 1000])
def test_every_item_is_drawn_equally_often(n_items):
    users, k = 6000, 10
    counts = np.bincount(
        drawn(range(users), met=[()] * users, n_items=n_items, k=k).ravel(), minlength=n_items
    )
    expected = users * k / n_items
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert abs(chi_square - n_items) < 5 * np.sqrt(2 * n_items)


def test_a_long_history_does_not_starve_the_draw():
    met = [tuple(range(30))]
    row = drawn([0], met, n_items=50, k=20)[0]
    assert sorted(row) == list(range(30, 50))


def test_unused_ids_change_no_candidate(tmp_path):
    rng = np.random.default_rng(0)
    dense = [rng.permutation(30)[:6].tolist() for _ in range(12)]
    gappy = [[3 * i + 7 for i in items] for items in dense]
    views = []
    for name, sequences in (("dense", dense), ("gappy", gappy)):
        data = read_csv(write_sequences(tmp_path / f"{name}.csv", sequences))
        views.append(EvaluationSplit(data, TEST, 5, 42, 10))
    everyone = np.arange(12)
    assert np.array_equal(views[0].candidates(everyone), views[1].candidates(everyone))


def test_no_candidate_was_met_at_any_time_and_splits_differ(tmp_path):
    rng = np.random.default_rng(0)
    data = read_csv(
        write_sequences(tmp_path / "d.csv", [rng.permutation(60)[:8].tolist() for _ in range(20)])
    )
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


@pytest.mark.parametrize("n_items", [1, 2, 3, 50, 64, 65, 1000])
def test_the_inverse_tells_where_a_value_stands(n_items):
    from datasets.candidates import _keys, _permuted, _positions

    bits = max(1, int(n_items - 1).bit_length())
    keys = _keys((5, 1), np.arange(20))
    values = _permuted(keys, np.arange(1 << bits, dtype=np.uint32), bits)
    assert (np.sort(values, axis=1) == np.arange(1 << bits)).all()
    for place in range(1 << bits):
        assert (_positions(keys, values[:, place], bits) == place).all()


def test_the_draw_equals_a_plain_walk_over_the_order():
    """Item by item in each row's order, the first K that are in the catalogue and not met."""
    from datasets.candidates import _keys, _permuted

    rng = np.random.default_rng(0)
    met = [rng.integers(0, 700, n) for n in (0, 5, 300, 690, 1)]
    given = drawn(range(5), met=met, n_items=700, k=250)
    order = _permuted(_keys((7, 1), np.arange(5)), np.arange(1024, dtype=np.uint32), 10)
    for row in range(5):
        walk = [int(item) for item in order[row] if item < 700 and item not in met[row]][:250]
        assert given[row].tolist() == walk + [-1] * (250 - len(walk))


def test_uniform_draws_are_a_function_of_key_and_row_alone():
    """In any batch; another step draws others; every item is as likely."""
    rows = np.array([5, 0, 9])
    drawn = uniform((7, 3), rows, 11, 4000)
    assert drawn.shape == (3, 4000) and drawn.min() == 0 and drawn.max() == 10
    assert np.array_equal(uniform((7, 3), rows[[2, 0]], 11, 4000), drawn[[2, 0]])
    assert not np.array_equal(uniform((7, 4), rows, 11, 4000), drawn)
    counts = np.bincount(drawn.ravel(), minlength=11)
    assert ((counts - 12000 / 11) ** 2 / (12000 / 11)).sum() < 29.6  # chi-square, 10 freedoms, .001
