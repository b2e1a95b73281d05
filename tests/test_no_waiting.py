"""A step never waits for the device: no operation depends on the data, or mixes two devices.

The device here is torch's `meta`: its tensors have no values, so an operation whose result's shape
depends on them fails, and one that mixes them with a CPU tensor too. It takes every branch that is
not the CPU's. (A fake `cuda` device cannot run a backward pass in a CPU build of torch: autograd
has no guard for it and ends the process.)

Outside it stay packing the batch and pinning (on the CPU by design), reading numbers back (`float`
of losses, ranks to numpy), random state, and autocast, which `meta` has not got.
"""

import contextlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from datasets.interactions import read_csv
from datasets.sequences import TEST, EvaluationSplit
from distill import StudentLoss, loss_parts
from engine.run import Run
from engine.state import Progress, State
from engine.tensor_cache import TensorCache
from models.catalogue import catalogue_cross_entropy
from models.losses import Output
from models.packed import Packed, in_one_copy
from models.sasrec import SASRec
from tests.conftest import histories, small_model, write_sequences
from utils.evaluation import Batch, rank_users
from utils.training import _Late

META = torch.device("meta")
LENGTHS = [3, 8, 1, 5] * 20
EVERY = StudentLoss(logit_lambda=0.5, sasrec_lambda=2.0, temperature=2.0)


@pytest.fixture(autouse=True)
def without_autocast(monkeypatch):
    """`meta` is no device type of autocast."""
    real = torch.autocast

    def autocast(kind, *args, **flags):
        return contextlib.nullcontext() if kind == "meta" else real(kind, *args, **flags)

    monkeypatch.setattr(torch, "autocast", autocast)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device_type: False)


def on_meta(model: torch.nn.Module) -> torch.nn.Module:
    """The model without values. Buffers that the library computes are moved too."""
    return model.float().to(META)


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device=META)


def step(model: torch.nn.Module, total: Tensor) -> None:
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    total.backward()
    assert all(p.grad is not None and p.grad.device == META for p in parameters)
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()


@pytest.mark.parametrize("strategy", ["full", "lora"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_teachers_step(strategy, checkpointing):
    model = on_meta(small_model(strategy=strategy, gradient_checkpointing=checkpointing)).train()
    target = empty(len(LENGTHS), dtype=torch.int64)
    parts = loss_parts(model(histories(LENGTHS)), None, None, model.item_table, target, EVERY)
    assert set(parts) == {"ce", "exits", "total"}
    step(model, parts["total"])


@pytest.mark.parametrize("strategy", ["full", "lora"])
def test_a_distillation_step_with_cached_outputs(strategy):
    model, n = on_meta(small_model(strategy=strategy)).train(), len(LENGTHS)
    shapes = {"user": (n, 6), "states": (n, 2, 32), "exits": (n, 1, 6)}
    states = TensorCache({name: torch.zeros(shape) for name, shape in shapes.items()})
    teacher = Output(**states.rows(np.arange(n), META))
    sasrec = teacher._replace(user=empty(n, 6))
    target = empty(n, dtype=torch.int64)
    out = model(histories(LENGTHS))
    parts = loss_parts(out, teacher, sasrec, model.item_table, target, EVERY)
    assert {"align_cos", "align_norm", "logit_kl", "sasrec_kl", "exits"} < set(parts)
    step(model, parts["total"])


def sasrec() -> SASRec:
    shape = {"emb_dim": 6, "hid_dim": 4, "num_blocks": 2, "num_heads": 2, "dropout": 0.5}
    return on_meta(SASRec(23, 8, norm="query", init_std=0.02, **shape))


def test_sasrecs_step():
    model = sasrec().train()
    states = model.states(histories(LENGTHS))
    assert states.shape == (sum(LENGTHS), 6)
    target = empty(len(states), dtype=torch.int64)
    step(model, catalogue_cross_entropy(states, model.item_table, target))


@pytest.fixture
def batch(tmp_path) -> Batch:
    """An evaluation batch on the device: 23 users, 23 items, five candidates per user."""
    sequences = [[(7 * user + 2 * place) % 23 for place in range(6)] for user in range(23)]
    data = read_csv(write_sequences(tmp_path / "shop.csv", sequences))
    (batch,) = EvaluationSplit(data, TEST, 8, 0, 5).batches(len(sequences), META)
    return batch


def test_from_histories_to_ranks(batch):
    for model in (on_meta(small_model()), sasrec().eval()):
        encode = model.user_encoder()
        ranks = rank_users(encode(batch.history), model.item_table.float().T, batch)
        assert ranks.device == META and ranks.shape == (3, 23)


def tensors(value):
    return [part for part in tree_leaves(value) if isinstance(part, Tensor)]


def test_a_batch_goes_to_the_device_in_one_copy():
    packed = Packed.of(histories(LENGTHS), 23, 4, 2)
    copied, moved = in_one_copy(packed, torch.device("cpu")), in_one_copy(packed, META)
    pairs = zip(tensors(packed), tensors(copied), strict=True)
    assert all(tensor.dtype == other.dtype and tensor.equal(other) for tensor, other in pairs)
    assert [group[:2] for group in copied.groups] == [g[:2] for g in packed.groups]
    assert len({tensor.untyped_storage().nbytes() for tensor in tensors(moved)}) == 1


def test_a_tensor_left_behind_is_noticed(monkeypatch):
    """What these tests are for: without the move to the device they fail."""
    model = on_meta(small_model())
    monkeypatch.setattr("models.packed.in_one_copy", lambda packed, device: packed)
    with pytest.raises(Exception, match="device|meta"):
        model(histories(LENGTHS))


def test_the_students_forward_is_one_graph():
    model = small_model(layers=2).eval()
    packed = model.pack(histories(LENGTHS))
    compiled = torch.compile(model.forward_packed, backend="eager", fullgraph=True)
    with torch.no_grad():
        for ours, plain in zip(compiled(packed), model(histories(LENGTHS))):
            torch.testing.assert_close(ours, plain, atol=1e-12, rtol=1e-12)


def test_the_optimizer_and_the_log_read_nothing_of_the_present_step(tmp_path):
    """Every scalar that the CPU reads while a step runs is one of an earlier step's."""
    reads, aten = [], torch.ops.aten

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function in (aten._local_scalar_dense.default, aten.nonzero.default):
                reads.append(str(function))
            return function(*args, **(kwargs or {}))

    module = torch.nn.Linear(3, 2)
    run = Run("sasrec", tmp_path, {"flags": {}})
    state = State(run, module, 1e-2, 0.0, None)
    samples, progress = SimpleNamespace(users=list), Progress()
    late = _Late(run, samples, progress, SimpleNamespace(received=0))
    totals, before = [], module.weight.clone()
    with Watch():
        for step in (1, 2, 3):
            total = module(torch.ones(1, 3)).square().sum() / step
            total.backward()
            values = {"total": total.detach(), "grad_norm": state.clip(1.0)}
            late.add(step, np.arange(2), values)
            state.step(torch.isfinite(values["total"] + values["grad_norm"]))
            totals.append(values["total"])
            late.read(everything=False)
            assert len(progress.running.get("total", [])) == step - 1
    assert not reads
    late.read(everything=True)
    assert progress.running["total"] == [float(total) for total in totals]
    assert not torch.equal(before, module.weight)


def test_a_step_that_is_not_finite_changes_no_weight(tmp_path):
    module = torch.nn.Linear(3, 2)
    state = State(Run("sasrec", tmp_path, {"flags": {}}), module, 1e-2, 0.0, None)
    module(torch.ones(1, 3)).sum().backward()
    before = [p.clone() for p in module.parameters()]
    state.step(torch.tensor(False))
    assert all(torch.equal(old, p) for old, p in zip(before, module.parameters()))
    assert all(p.grad is None for p in module.parameters())
