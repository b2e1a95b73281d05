import pytest
import torch
from torch import nn

from engine import checkpoint
from engine.errors import RunError, UsageError


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    checkpoint.save(tmp_path / "best", checkpoint.trained_tensors(model), {"step": 7})
    return model, tmp_path / "best"


def test_only_what_was_trained_is_kept_and_comes_back(saved):
    model, folder = saved
    tensors, meta = checkpoint.load(folder)
    assert set(tensors) == {"weight"} and meta == {"step": 7}
    other = nn.Linear(3, 2)
    other.bias.requires_grad_(False)
    checkpoint.restore(other, tensors, folder)
    assert torch.equal(other.weight, model.weight)
    assert [p.name for p in folder.parent.iterdir()] == ["best"]


def test_a_save_that_fails_leaves_the_old_checkpoint(saved, monkeypatch):
    _, folder = saved
    before = checkpoint.load(folder)[1]

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.os, "fsync", full)
    told = r"on device\): [\d,]+ bytes needed, [\d,]+ free; the checkpoint that was there stays"
    with pytest.raises(RunError, match=told):
        checkpoint.save(folder, {"weight": torch.ones(2, 3)}, {"step": 8})
    assert checkpoint.load(folder)[1] == before
    assert [p.name for p in folder.parent.iterdir()] == ["best"]


def test_a_misfit_is_told(saved):
    _, folder = saved
    tensors, _ = checkpoint.load(folder)
    with pytest.raises(UsageError, match=r"lacks bias \(1 differences\)"):
        checkpoint.restore(nn.Linear(3, 2), tensors, folder)
    with pytest.raises(UsageError, match=r"weight is \[2, 3\], expected \[2, 4\]"):
        checkpoint.restore(nn.Linear(4, 2, bias=False), tensors, folder)
    with pytest.raises(UsageError, match="has weight, which the model lacks"):
        checkpoint.restore(nn.LayerNorm(2, bias=False).requires_grad_(False), tensors, folder)
