import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from engine import checkpoint
from engine.run import Run
from tests.conftest import trained_lines
from utils import training
from utils.evaluation import Ranks
from utils.flags import Runtime, SASRecTraining, Training

SETTINGS = {"batch_size": 8, "num_epochs": 2, "learning_rate": 0.1, "warmup_steps": 2}
SETTINGS |= {"eval_steps": -1, "seed": 3}
N = 20


def run(tmp_path, mrrs=(0.5,), counts=None, micro=None, full=None, **changes):
    """Fit a linear model on fixed data; `mrrs` are the validation MRRs in order (the last one
    repeats), `full` those of the whole catalogue where they are others.
    """
    torch.manual_seed(0)
    inputs, wanted = torch.randn(N, 3, dtype=torch.float64), torch.randn(N, dtype=torch.float64)
    model = nn.Linear(3, 1).double()
    counts = np.ones(N, int) if counts is None else counts
    weight = torch.from_numpy(counts).double()
    seen, limits, modes = [], [], []

    def loss_fn(rows):
        seen.append(rows.tolist())
        error = (model(inputs[rows]).squeeze(1) - wanted[rows]) ** 2
        loss = (error * weight[rows]).sum() / weight[rows].sum()  # a mean over targets
        return {"ce": loss, "total": loss}

    def evaluate(model, split, runtime, limit=None):
        limits.append(limit)
        modes.append(model.training)
        found = []
        for each in (mrrs, full or mrrs, full or mrrs):
            rank = 1 / each[min(len(limits) - 2, len(each) - 1)] if len(limits) > 1 else 1
            found.append(np.array([rank]))
        return Ranks(*found)

    folder = tmp_path / "run"
    folder.mkdir(exist_ok=True, parents=True)
    settings = Training(**SETTINGS | changes)
    runtime = Runtime(micro_batch_size=micro, save_steps=-1, log_steps=1)
    samples = SimpleNamespace(counts=lambda: counts, batch=lambda rows, device, step: rows)
    data = SimpleNamespace(samples=samples, splits={"valid": None})
    run = Run("test", folder, {}, (settings, runtime))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "evaluate", evaluate)
        fitted = training.fit(run, model, loss_fn, model, data, settings, runtime)
    assert not any(modes)
    return model, fitted, seen, limits, folder


def test_an_epoch_is_a_permutation_and_the_next_one_another(tmp_path):
    _, fitted, seen, limits, _ = run(tmp_path)
    assert [len(rows) for rows in seen] == [8, 8, 4, 8, 8, 4]
    first, second = sum(seen[:3], []), sum(seen[3:], [])
    assert sorted(first) == sorted(second) == list(range(N)) and first != second
    assert fitted["steps"] == 6
    assert limits == [2, None, None]


@pytest.mark.parametrize("micro", [4, 2, 1])
@pytest.mark.parametrize("uneven", [False, True])
def test_accumulation_changes_nothing(tmp_path, micro, uneven):
    counts = np.random.default_rng(0).integers(1, 9, N) if uneven else None
    whole, *_ = run(tmp_path, counts=counts)
    parts, *_ = run(tmp_path, counts=counts, micro=micro)
    torch.testing.assert_close(parts.weight, whole.weight, atol=1e-13, rtol=1e-13)


def test_max_steps_wins_over_epochs_and_the_same_seed_gives_the_same_run(tmp_path):
    one, fitted, seen, _, _ = run(tmp_path, max_steps=4)
    assert fitted["steps"] == 4 and len(seen) == 4
    two, _, again, _, _ = run(tmp_path, max_steps=4)
    assert seen == again and torch.equal(one.weight, two.weight)
    other, _, different, _, _ = run(tmp_path, max_steps=4, seed=4)
    assert different != seen


def test_best_is_the_highest_mrr_and_the_first_of_equals(tmp_path):
    _, fitted, _, _, folder = run(tmp_path, mrrs=(0.1, 0.5, 0.5, 0.2), num_epochs=4)
    assert fitted["best_step"] == 6
    assert checkpoint.load(folder / "best")[1]["step"] == 6
    assert checkpoint.load(folder / "last")[1]["step"] == 12


def test_patience_counts_evaluations_without_a_better_one(tmp_path):
    mrrs = (0.1, 0.5, 0.4, 0.5, 0.9)
    _, fitted, _, _, folder = run(tmp_path, mrrs, num_epochs=5, patience=2)
    assert fitted["steps"] == 12 and fitted["best_step"] == 6
    assert checkpoint.load(folder / "last")[1]["step"] == 12


RATES = {"cosine": [0.75, 0.25], "linear": [2 / 3, 1 / 3], "constant": [1, 1]}


@pytest.mark.parametrize("kind, expected", [(k, [0.5, 1, 1, *end]) for k, end in RATES.items()])
def test_schedule_by_hand(tmp_path, kind, expected):
    *_, folder = run(tmp_path, max_steps=5, lr_scheduler=kind, learning_rate=1.0)
    rates = [line["learning_rate"] for line in trained_lines(folder)]
    assert rates == pytest.approx(expected)


def plan(n, group=Training, **changes):
    return training.Plan.of(n, group(**changes), Runtime())


def test_what_was_not_given_fits_the_amount_of_training():
    """442 users are 2 steps per epoch; 20 epochs would be 40 steps with a warm-up of 50."""
    few = plan(442)
    assert (few.per_epoch, few.total, few.warmup) == (2, 240, 24)
    assert (few.eval_every, few.save_every, few.patience_from) == (48, 48, 500)
    many = plan(22_363)  # 88 steps per epoch
    assert (many.total, many.warmup, many.eval_every, many.patience_from) == (1760, 50, 100, 500)


def test_what_was_given_is_taken_as_it_is():
    given = plan(442, num_epochs=3, warmup_steps=50, eval_steps=100, patience=2)
    assert (given.total, given.warmup, given.eval_every) == (6, 50, 100)
    assert (given.patience, given.patience_from) == (2, 0)
    assert plan(442, max_steps=7).total == 7 and plan(442, max_steps=7).warmup == 0


def test_every_epoch_is_not_every_step():
    """Step 1 evaluates every epoch: of 2 steps on 442 users, of 88 on 22,363."""
    few = plan(442, SASRecTraining)
    assert (few.total, few.warmup, few.eval_every, few.save_every) == (400, 0, 10, 10)
    assert plan(22_363, SASRecTraining).eval_every == 88
    assert plan(442, eval_steps=-1).eval_every == 2  # given


def test_patience_counts_from_where_there_is_something_to_judge(tmp_path):
    """Ten evaluations without a better one before step 500 end nothing."""
    found = plan(N, SASRecTraining)
    assert (found.patience, found.patience_from) == (10, 500)
    waited = training.Progress(step=490, waited=12)
    assert not found.ends(waited) and found.ends(dataclasses.replace(waited, step=500))
    fitted = run(tmp_path, mrrs=(0.5, 0.1), num_epochs=12, patience=2)[1]
    assert fitted["steps"] == 9  # given: the first evaluation is the best, two more end it


def test_the_best_checkpoint_is_chosen_by_the_named_metric(tmp_path):
    """Sampled MRR falls after the first evaluation, NDCG@10 in the whole catalogue rises."""
    given = {"mrrs": (0.5, 0.25), "full": (0.2, 0.5)}
    assert run(tmp_path / "a", **given)[1]["best_step"] == 3
    assert run(tmp_path / "b", **given, select="full_ndcg10")[1]["best_step"] == 6
