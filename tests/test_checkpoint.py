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


def test_a_second_save_replaces_the_first(saved):
    _, folder = saved
    checkpoint.save(folder, {"weight": torch.ones(2, 3)}, {"step": 8})
    tensors, meta = checkpoint.load(folder)
    assert meta["step"] == 8 and torch.equal(tensors["weight"], torch.ones(2, 3))
    assert [p.name for p in folder.parent.iterdir()] == ["best"]


@pytest.mark.parametrize("name", ["weights.safetensors", "meta.json", "manifest.json"])
@pytest.mark.parametrize("harm", ["delete", "truncate", "empty", "flip"])
def test_any_damage_is_noticed(saved, name, harm):
    _, folder = saved
    path = folder / name
    content = path.read_bytes()
    if harm == "delete":
        path.unlink()
    else:
        flipped = content[:-3] + bytes([content[-3] ^ 4]) + content[-2:]
        path.write_bytes({"truncate": content[:-5], "empty": b"", "flip": flipped}[harm])
    with pytest.raises(UsageError, match="checkpoint .*(missing|damaged|sha256)"):
        checkpoint.load(folder)


def test_a_save_that_fails_leaves_the_old_checkpoint(saved, monkeypatch):
    _, folder = saved
    before = checkpoint.load(folder)[1]
    monkeypatch.setattr(
        checkpoint.os,
        "fsync",
        lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")),
    )
    with pytest.raises(
        RunError,
        match=(
            r"No space left on device\): [\d,]+ bytes needed, [\d,]+ free; the checkpoint that "
            r"was there stays"
        ),
    ):
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
    with pytest.raises(UsageError, match="checkpoint not found"):
        checkpoint.load(folder.parent / "last")
