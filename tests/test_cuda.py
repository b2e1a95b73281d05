"""What only a CUDA device shows: the same numbers as on CPU, and a step that never waits."""

import copy

import pytest
import torch

from datasets.interactions import read_csv
from datasets.sequences import TEST, EvaluationSplit
from distill import StudentLoss, loss_parts
from models.catalogue import catalogue_cross_entropy
from models.sasrec import SASRec
from tests.conftest import histories, small_model, write_sequences
from utils.evaluation import rank_all

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
LENGTHS = [3, 8, 1, 5] * 20
ALONE = StudentLoss(distill_lambda=0, norm_lambda=0)


def sasrec() -> SASRec:
    shape = {"emb_dim": 6, "hid_dim": 4, "num_blocks": 2, "num_heads": 2, "dropout": 0.0}
    torch.manual_seed(0)
    return SASRec(23, 8, norm="query", init_std=0.02, **shape).double()


def student_loss(model, target):
    given = None, None, model.item_table, target[: len(LENGTHS)], ALONE
    return loss_parts(model(histories(LENGTHS)), *given)["total"]


def sasrec_loss(model, target):
    return catalogue_cross_entropy(model.states(histories(LENGTHS)), model.item_table, target)


TARGET = torch.arange(sum(LENGTHS)) % 23


@pytest.mark.parametrize(
    "model, loss",
    [(lambda: small_model(), student_loss), (sasrec, sasrec_loss)],
    ids=["student", "sasrec"],
)
def test_loss_and_gradients_are_those_of_the_cpu(model, loss, monkeypatch):
    def norm(self, x):  # the library's computes in float32 whatever its input
        return self.weight * x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()

    monkeypatch.setattr("transformers.models.llama.modeling_llama.LlamaRMSNorm.forward", norm)
    on_cpu = model()
    on_cuda = copy.deepcopy(on_cpu).cuda()

    def angles(x, length, position):  # the library computes them in float32: the CPU's for both
        return [t.cuda() for t in on_cpu.decoder._rotation(x.cpu(), length, position.cpu())]

    if hasattr(on_cpu, "decoder"):
        on_cuda.decoder._rotation = angles
    found = []
    for each in (on_cpu, on_cuda):
        value = loss(each, TARGET.to(each.item_table.device))
        value.backward()
        found.append([value, *(p.grad for p in each.parameters() if p.grad is not None)])
    for expected, other in zip(*found):
        torch.testing.assert_close(other.cpu(), expected, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize(
    "model, loss",
    [(lambda: small_model().float(), student_loss), (lambda: sasrec().float(), sasrec_loss)],
    ids=["student", "sasrec"],
)
def test_no_step_waits_for_the_device(model, loss):
    model = model().cuda().train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, fused=True)
    target = TARGET.cuda()
    loss(model, target).backward()  # warms up
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        value = loss(model, target)
        value.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0, foreach=True)
        optimizer.found_inf = (~torch.isfinite(value + norm)).float()
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_ranks_are_those_of_the_cpu(tmp_path):
    sequences = [[(7 * user + 2 * place) % 23 for place in range(6)] for user in range(23)]
    data = read_csv(write_sequences(tmp_path / "shop.csv", sequences))
    split, model = EvaluationSplit(data, TEST, 8, 0, 5), sasrec()
    found = []
    for device in ("cpu", "cuda"):
        model.to(device)
        ranks = rank_all(model.user_encoder(), model.item_table, split.batches(7, device))
        found.append([values.tolist() for values in ranks])
    assert found[0] == found[1]
