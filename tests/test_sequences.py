import numpy as np
import pytest
import torch

from datasets.inputs import read_inputs
from datasets.interactions import read_csv
from datasets.sequences import TEST, VALID, EvaluationSplit, describe, popularity, training_samples
from tests.conftest import write_sequences
from utils.evaluation import Ranks
from utils.flags import Evaluation, Prompt, TeacherFiles, Training

PAD = 7  # the ids are 1 .. 7, so catalogue indices 0 .. 6 and the padding 7


@pytest.fixture
def data(tmp_path):
    return read_csv(write_sequences(tmp_path / "d.csv", [[1, 2, 3, 4, 5, 6, 7], [4, 3, 2, 1]]))


def test_the_first_batch_is_the_literal_one(data):
    samples = training_samples(data, "last", 5, every_position=True)
    rows = np.array([0, 1])
    assert samples.histories(rows).tolist() == [[PAD, 0, 1, 2, 3], [PAD, PAD, PAD, PAD, 3]]
    assert samples.targets(rows).tolist() == [4, 2]
    assert samples.shifted_targets(rows).tolist() == [[PAD, 1, 2, 3, 4], [PAD, PAD, PAD, PAD, 2]]
    assert samples.counts().tolist() == samples.lengths().tolist() == [4, 1]
    assert training_samples(data, "last", 5).counts().tolist() == [1, 1]


def test_long_histories_keep_their_last_items(data):
    samples = training_samples(data, "last", 2, every_position=True)
    first = np.array([0])
    assert samples.histories(first).tolist() == [[2, 3]] and samples.counts().tolist() == [2, 1]
    assert samples.shifted_targets(first).tolist() == [[3, 4]]


def test_all_makes_every_prefix_a_sample(data):
    samples = training_samples(data, "all", 3)
    rows = np.arange(len(samples))
    first = [[PAD, PAD, 0], [PAD, 0, 1], [0, 1, 2], [1, 2, 3]]
    assert samples.histories(rows).tolist() == [*first, [PAD, PAD, 3]]
    assert samples.targets(rows).tolist() == [1, 2, 3, 4, 2]


def test_evaluation_batches_are_the_literal_ones(data):
    for split, history, target, seen in (
        (VALID, [[1, 2, 3, 4], [PAD, PAD, 3, 2]], [5, 1], [[0, 1, 2, 3, 4], [1, 1, 1, 3, 2]]),
        (TEST, [[2, 3, 4, 5], [PAD, 3, 2, 1]], [6, 0], [[0, 1, 2, 3, 4, 5], [0, 0, 0, 3, 2, 1]]),
    ):
        (batch,) = EvaluationSplit(data, split, 4, 42, 3).batches(2)
        assert batch.history.tolist() == history and batch.target.tolist() == target
        assert batch.seen.tolist() == seen  # filled up with the target


def test_a_limit_gives_the_first_batches_and_who_meets_every_item_is_counted(data):
    view = EvaluationSplit(data, TEST, 4, 42, 3)
    assert [len(batch.target) for batch in view.batches(1, limit=1)] == [1]
    assert view.never_met.tolist() == [0, 3] and view.fewest_candidates() == 0
    told = describe(data, training_samples(data, "last", 4), {"test": view})
    assert "only 2 users are evaluated: their figures say little\n1 users meet every item" in told


def test_popularity_counts_training_items_only(data):
    # users 1-5 of the first, 4-3 of the second
    assert popularity(data).tolist() == [1, 1, 2, 2, 1, 0, 0]


def test_repeated_targets_are_counted_and_the_others_ranked_apart(tmp_path):
    lists = [[1, 2, 3, 1], [1, 2, 2, 3], [4, 4, 4, 4], [5, 6, 7, 8], [9, 6, 5, 7, 6]]
    data = read_csv(write_sequences(tmp_path / "d.csv", lists))
    test, valid = (EvaluationSplit(data, split, 5, 42, 2).repeated() for split in (TEST, VALID))
    assert test.tolist() == [True, False, True, False, True]
    assert valid.tolist() == [False, True, True, False, False]
    ranks = Ranks(*[np.array([1, 4, 1, 2, 1])] * 3)
    assert ranks.metrics(~test)["full"]["MRR"] == pytest.approx((1 / 4 + 1 / 2) / 2)


@pytest.mark.parametrize("batch_size, targets, n", [(16, "last", 32), (17, "all", 96)])
def test_fewer_users_than_two_batches_train_on_every_prefix(tmp_path, batch_size, targets, n):
    """32 users of six items: one target each, or the three prefixes before validation."""
    sequences = [[(3 * user + 2 * place) % 23 for place in range(6)] for user in range(32)]
    write_sequences(tmp_path / "shop.csv", sequences)
    torch.save({"item_embedding": torch.rand(23, 4)}, tmp_path / "t.pkl")
    names = {"data_path": str(tmp_path / "shop.csv"), "item_table": str(tmp_path / "t.pkl")}
    files = TeacherFiles(domain_type="shop", **names)
    inputs = read_inputs(files)
    _, training = inputs.settled(files, Training(batch_size=batch_size))
    data = inputs.load(Prompt(), training, Evaluation(), "cpu")
    assert (training.train_targets, len(data.samples)) == (targets, n)
    asked = Training(batch_size=batch_size, train_targets="last")
    assert len(inputs.load(Prompt(), asked, Evaluation(), "cpu").samples) == 32
