"""`--compile` gives the numbers of the steps as they are."""

import shutil

import pytest
import torch

import distill
import finetune
from distill import StudentLoss, loss_parts
from engine.errors import UsageError
from tests.conftest import histories, small_model

BATCHES = [3, 8, 1, 5, 2, 7] * 6, [2, 1, 4] * 13  # lengths; the second has other shapes
LORA = {"strategy": "lora", "kv_heads": 2}
FULL = {"strategy": "full", "gradient_checkpointing": True}
needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs g++")


def losses_and_gradients(model, lengths: list[int]) -> list[torch.Tensor]:
    model.zero_grad(set_to_none=True)
    target = torch.arange(len(lengths)) % len(model.item_table)
    loss = StudentLoss(distill_lambda=0, norm_lambda=0)
    parts = loss_parts(model(histories(lengths)), None, None, model.item_table, target, loss)
    parts["total"].backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    return [*(part.detach() for part in parts.values()), *gradients]


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("shape", [LORA, FULL], ids=["lora", "full"])
def test_losses_and_gradients_are_the_same(shape, float64_norm):
    plain, compiled = (small_model(**shape, compiled=c).train() for c in (False, True))
    for lengths in BATCHES:
        pairs = zip(losses_and_gradients(plain, lengths), losses_and_gradients(compiled, lengths))
        for expected, found in pairs:
            scale = float(expected.abs().max())
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-9 * scale)


def test_steps_are_compiled_in_training_alone(monkeypatch):
    asked = []

    def noted(step):
        asked.append(step.__name__)
        return step

    monkeypatch.setattr("models.attention._compiled", noted)
    model = small_model(layers=2, n_blocks=1, compiled=True)
    with torch.no_grad():
        model(histories([3, 8]))
    assert not asked
    model(histories([3, 8]))
    inner, last = ["queries_keys_values", "_feed"], ["queries_keys_values", "_joined", "_feed"]
    assert asked == inner + last


@pytest.mark.parametrize("main", [finetune.main, distill.main])
def test_without_a_compiler_it_is_refused(inside, monkeypatch, main):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UsageError, match="--compile: no C\\+\\+ compiler no-such-compiler"):
        main(compile=True)
