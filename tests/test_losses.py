import math

import pytest
import torch
import torch.nn.functional as F

from distill import StudentLoss, loss_parts
from models import catalogue, losses
from models.catalogue import catalogue_cross_entropy
from models.losses import block_cosine, block_distance, logit_kl, user_kl
from tests.conftest import histories, small_model


@pytest.mark.parametrize("tile", [(1, 1), (3, 4), (256, 2048)])
@pytest.mark.parametrize("trained_table", [True, False])
@pytest.mark.parametrize("whole_rows", [1, 3 * 13, 2**20])
def test_catalogue_cross_entropy_equals_the_plain_one(tile, trained_table, whole_rows, monkeypatch):
    monkeypatch.setattr(catalogue, "CPU_TILE", tile)
    monkeypatch.setattr(catalogue, "CPU_WHOLE", whole_rows)
    monkeypatch.setattr(catalogue, "FEWEST_ROWS", 1)
    torch.manual_seed(0)
    users = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    table = torch.randn(13, 5, dtype=torch.float64, requires_grad=trained_table)
    target = torch.tensor([0, 12, 3, 3, 5, 0, 1])
    inputs = [users, table] if trained_table else [users]
    plain = F.cross_entropy(users @ table.T, target)
    ours = catalogue_cross_entropy(users, table, target)
    torch.testing.assert_close(ours, plain, atol=1e-14, rtol=1e-13)
    wanted = torch.autograd.grad(3 * plain, inputs)
    torch.autograd.grad(ours, inputs, retain_graph=True)  # a first backward must not spoil a second
    given = torch.autograd.grad(3 * ours, inputs)
    torch.testing.assert_close(given, wanted, atol=1e-14, rtol=1e-12)


@pytest.mark.parametrize("tile", [(1, 1), (3, 4), (256, 2048)])
def test_user_kl_equals_the_plain_one(tile, monkeypatch):
    monkeypatch.setattr(catalogue, "CPU_TILE", tile)
    torch.manual_seed(0)
    shapes = (5, 3, 4), (13, 4)
    teacher, table = (torch.randn(*shape, dtype=torch.float64) for shape in shapes)
    student = torch.randn(5, 3, 4, dtype=torch.float64, requires_grad=True)
    p, q = (F.log_softmax(users @ table.T / 1.7, dim=-1) for users in (teacher, student))
    plain = 1.7**2 * F.kl_div(q, p, log_target=True, reduction="none").sum(-1).mean(0).sum()
    ours = user_kl(teacher, student, table, 1.7, "sum")
    torch.testing.assert_close(ours, plain, atol=1e-13, rtol=1e-12)
    found, wanted = (torch.autograd.grad(value, student)[0] for value in (ours, plain))
    torch.testing.assert_close(found, wanted, atol=1e-13, rtol=1e-12)


def test_large_logits_neither_overflow_nor_lose_the_loss():
    users = torch.tensor([[300.0], [-300.0]], requires_grad=True)
    table, target = torch.linspace(-1, 1, 5000)[:, None], torch.tensor([4999, 4999])
    plain = F.cross_entropy((users @ table.T).double(), target)
    ours = catalogue_cross_entropy(users, table, target)
    assert float(ours.detach()) == pytest.approx(float(plain.detach()), rel=1e-5)
    assert torch.isfinite(torch.autograd.grad(ours, users)[0]).all()


def test_a_confident_row_has_a_small_loss():
    """Its logit and the partition are of two products: an error of the last bits, no more."""
    torch.manual_seed(0)
    table = torch.randn(5000, 128)
    # own logit about 32, the others' spread about 3
    users = table[:64] * 0.25 + 0.001 * torch.randn(64, 128)
    target = torch.arange(64)
    exact = float(F.cross_entropy(users.double() @ table.double().T, target))
    assert 0 < exact < 1e-3
    assert float(catalogue_cross_entropy(users, table, target)) == pytest.approx(exact, abs=2e-5)


@pytest.mark.parametrize("spoilt", [math.nan, math.inf])
def test_a_table_that_is_not_finite_gives_a_loss_that_is_not(spoilt):
    table = torch.ones(9, 2)
    table[4] = spoilt
    loss = catalogue_cross_entropy(torch.ones(3, 2), table, torch.tensor([0, 1, 2]))
    assert not torch.isfinite(loss)


def test_no_tile_of_logits_is_larger_than_said(monkeypatch):
    """256 rows, 30,000 items: nothing as large as the logits is made, the table trained or not."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                self.size = max(self.size, out.numel())
            return out

    for trained in (False, True):
        users = torch.randn(256, 4, requires_grad=True)
        table = torch.randn(30000, 4, requires_grad=trained)
        with Largest() as seen:
            catalogue_cross_entropy(users, table, torch.arange(256)).backward()
        most = max(math.prod(catalogue.CPU_TILE), catalogue.CPU_WHOLE, table.numel())
        assert table.numel() <= seen.size <= most < 256 * 30000


def test_sampled_cross_entropy_against_a_loop():
    """A negative that is the target itself does not count."""
    torch.manual_seed(0)
    states = torch.randn(9, 5, dtype=torch.float64, requires_grad=True)
    table = torch.randn(9, 5, dtype=torch.float64, requires_grad=True)
    owner, target = [0, 0, 1, 1, 1, 2, 2, 2, 2], torch.tensor([1, 2, 3, 3, 8, 0, 1, 2, 4])
    negatives = torch.tensor([[1, 1, 7], [3, 5, 0], [8, 4, 4]])
    each = []
    for user, wanted, state in zip(owner, target.tolist(), states):
        others = [int(item) for item in negatives[user] if item != wanted]
        each.append(-F.log_softmax(table[[wanted, *others]] @ state, dim=0)[0])
    plain = torch.stack(each).mean()
    ours = losses.sampled_cross_entropy(states, table, target, negatives, [2, 3, 4])
    torch.testing.assert_close(ours, plain, atol=1e-14, rtol=1e-13)
    given, wanted = (torch.autograd.grad(value, [states, table]) for value in (ours, plain))
    torch.testing.assert_close(given, wanted, atol=1e-14, rtol=1e-12)


STUDENT = torch.tensor([[[1.0, 0.0], [3.0, 4.0]]])  # [B 1, E 2, H 2]
TEACHER = torch.tensor([[[0.0, 2.0], [6.0, 8.0]]])


def test_alignment_by_hand():
    # cosines 0 and 1; differences (1, -2) and (-3, -4)
    assert float(block_cosine(TEACHER, STUDENT, "sum")) == pytest.approx(1.0)
    assert float(block_cosine(TEACHER, STUDENT, "mean")) == pytest.approx(0.5)
    assert float(block_distance(TEACHER, STUDENT, "sum", "l2")) == pytest.approx(math.sqrt(5) + 5)
    assert float(block_distance(TEACHER, STUDENT, "mean", "squared_l2")) == pytest.approx(15)


def test_equal_models_align_perfectly_and_pull_nowhere():
    states = torch.randn(4, 3, 5, dtype=torch.float64).float()
    student = states.clone().requires_grad_()
    cosine = block_cosine(states, student, "sum")
    distance = block_distance(states, student, "sum", "l2")
    assert float(cosine.detach()) == pytest.approx(0.0, abs=1e-6)
    assert float(distance.detach()) == 0.0
    (slope,) = torch.autograd.grad(cosine + distance, student)
    assert torch.isfinite(slope).all() and slope.abs().max() < 1e-6


def test_exits_by_hand():
    table, target = torch.eye(2), torch.tensor([0])
    exits = torch.tensor([[[1.0, 0.0], [0.0, 2.0]]])  # one user, two exits
    each = [math.log(math.e + 1) - 1, math.log(1 + math.e**2)]
    for how, expected in (("sum", sum(each)), ("mean", sum(each) / 2)):
        found = float(losses.exit_supervision(exits, table, target, how))
        assert found == pytest.approx(expected, rel=1e-6)


def test_user_kl_by_hand_and_without_gradient_to_the_teacher():
    teacher = torch.tensor([[[math.log(3.0), 0.0]]], requires_grad=True)  # probabilities 3/4, 1/4
    student = torch.zeros(1, 1, 2, requires_grad=True)  # 1/2, 1/2
    value = user_kl(teacher, student, torch.eye(2), 1.0, "sum")
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert float(value.detach()) == pytest.approx(expected, rel=1e-6)
    value.backward()
    assert teacher.grad is None and student.grad.abs().sum() > 0


def test_gradients_reach_the_teacher_online_alone():
    batch, target = histories([3, 8, 1, 5]), torch.tensor([1, 2, 3, 4])
    for online in (False, True):
        teacher, student = small_model(seed=1).train(), small_model(layers=2, seed=2).train()
        with torch.set_grad_enabled(online):
            wanted = teacher(batch)
        outputs = student(batch), wanted, None
        given = *outputs, student.item_table, target, StudentLoss(), online
        loss_parts(*given)["total"].backward()
        assert all((p.grad is not None) == online for p in teacher.parameters())
        assert all(p.grad is not None for p in student.parameters())


def test_a_part_of_weight_zero_is_logged_alone():
    two, three = torch.tensor(2.0), torch.tensor(3.0)
    parts = losses.weighted_sum({"ce": (1.0, two), "kl": (0.5, three), "teacher_ce": (0.0, three)})
    found = {name: float(value) for name, value in parts.items()}
    assert found == {"ce": 2.0, "kl": 3.0, "teacher_ce": 3.0, "total": 3.5}


def test_logit_kl_is_per_block_only_where_both_have_exits():
    table = torch.eye(2)
    out = losses.Output(torch.zeros(1, 2), STUDENT, torch.zeros(1, 1, 2))
    user = torch.tensor([[math.log(3.0), 0.0]])
    wanted = losses.Output(user, TEACHER, user[None])
    one = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    both = logit_kl(wanted, out, table, 1.0, "sum")
    final = logit_kl(wanted._replace(exits=torch.zeros(1, 0, 2)), out, table, 1.0, "sum")
    assert float(both) == pytest.approx(2 * one, rel=1e-6)
    assert float(final) == pytest.approx(one, rel=1e-6)
