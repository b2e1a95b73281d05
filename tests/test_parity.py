"""The fast forward equals the plain padded Hugging Face forward, in float64."""

import copy
from types import SimpleNamespace

import pytest
import torch

from benchmarks.plain import plain_twin
from distill import StudentLoss, loss_parts
from models.attention import attend, attend_last, attend_last_on_grids, attend_on_grids
from models.packed import Packed
from tests.conftest import TARGETS, histories, small_model

pytestmark = pytest.mark.usefixtures("float64_norm")
LENGTHS = {
    "over groups": [8, 1, 5] * 30,
    "all lengths": [1, 2, 3, 4, 5, 6, 7, 8],
    "equal": [4, 4, 4],
    "shortest": [1, 1],
    "longest": [8, 8, 8],
    "one user": [3],
}
LORA = (3, 5, TARGETS)
LOSS = StudentLoss(cls_multiple_lambda=0.7, logit_lambda=0.5, temperature=2.0)


def given_by_both(ours, plain):
    """User, states and exits; a field that is new in Output has no plain form yet."""
    found = [*zip(ours._fields, ours, plain)]
    return found[:3] + [each for each in found[3:] if each[2] is not None]


def compare_outputs(ours, plain):
    for name, a, b in given_by_both(ours, plain):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12, msg=lambda text: f"{name}: {text}")


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("strategy", ["full", "lora"])
def test_outputs_scores_losses_and_gradients(lengths, kv_heads, strategy):
    model = small_model(kv_heads=kv_heads, strategy=strategy, n_blocks=4)
    plain, names = plain_twin(model, LORA if strategy == "lora" else None)
    teacher = small_model(layers=8, n_blocks=4, seed=9)
    plain_teacher, _ = plain_twin(teacher, None)
    batch, target = histories(lengths), torch.arange(len(lengths)) % 23
    ours, wanted = model.train()(batch), plain.train()(batch)
    compare_outputs(ours, wanted)
    scores = ours.user @ model.item_table.T, wanted.user @ plain.item_table.T
    torch.testing.assert_close(*scores, atol=1e-11, rtol=1e-12)
    with torch.no_grad():
        guide, plain_guide = teacher(batch), plain_teacher(batch)
    parts = loss_parts(ours, guide, None, model.item_table, target, LOSS)
    plain_parts = loss_parts(wanted, plain_guide, None, plain.item_table, target, LOSS)
    every = {"ce", "exits", "align_cos", "align_norm", "logit_kl", "teacher_ce", "total"}
    assert set(parts) == every
    for name in parts:
        torch.testing.assert_close(parts[name], plain_parts[name], atol=1e-11, rtol=1e-11)
    _, *both = zip(*given_by_both(ours, wanted))
    slopes = [torch.randn_like(value) for value in both[0]]
    for outputs in both:
        sum((value * slope).sum() for value, slope in zip(outputs, slopes)).backward()
    own = dict(plain.named_parameters())
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert any("lora_A" in name for name in trained) == (strategy == "lora")
    for name, parameter in trained.items():
        assert torch.allclose(parameter.grad, own[names[name]].grad, atol=1e-9, rtol=1e-9), name


SHAPES = {
    "one token before and after": ({"n_prompt": 1, "n_response": 1}, 8),
    "one token before": ({"n_prompt": 1, "n_response": 3}, 8),
    "one token after": ({"n_prompt": 6, "n_response": 1}, 8),
    "one block": ({"n_blocks": 1, "exit_heads": False}, 8),
    "four blocks": ({"n_blocks": 4}, 8),
    "normed exits": ({"n_blocks": 4, "exit_norm": True}, 8),
    "one layer": ({"layers": 1, "n_blocks": 1, "exit_heads": False}, 8),
    "fewer slots": ({}, 4),  # the response's positions shift, as in the plain form
    "more slots": ({}, 11),
}


@pytest.mark.parametrize("shape, slots", SHAPES.values(), ids=SHAPES.keys())
def test_every_shape(shape, slots):
    model, batch = small_model(**shape), histories([1, 4, 3], slots=slots)
    plain, _ = plain_twin(model, None)
    n_blocks = shape.get("n_blocks", 2)
    assert model(batch).states.shape == (3, n_blocks, 32)
    assert model(batch).exits.shape == (3, n_blocks - 1, 6)
    compare_outputs(model(batch), plain(batch))
    compare_outputs(model.encoder()(batch), plain(batch))


def test_a_cached_prompt_is_not_used_up():
    """Three batches of different widths over one cache, each equal to the forward without."""
    model = small_model()
    encode = model.encoder()
    for lengths in ([8, 1], [2, 2, 2], [5]):
        batch = histories(lengths, seed=sum(lengths))
        compare_outputs(encode(batch), model(batch))


@pytest.mark.parametrize("strategy", ["full", "lora"])
def test_gradient_checkpointing_changes_no_gradient(strategy):
    grads = []
    for checkpointing in (False, True):
        model = small_model(strategy=strategy, gradient_checkpointing=checkpointing).train()
        model(histories([3, 8, 1])).user.square().sum().backward()
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(grads[0]) == len(grads[1]) > 0
    torch.testing.assert_close(grads[0], grads[1], atol=1e-12, rtol=1e-12)


def test_bfloat16_autocast_rounds_no_worse_than_the_plain_form():
    model = small_model().float()
    plain, _ = plain_twin(model, None)
    batch = histories([3, 8, 1, 5, 2, 7] * 8)
    with torch.no_grad():
        exact = plain(batch).user
        with torch.autocast("cpu", torch.bfloat16):
            rounded = plain(batch).user
    rounding = copy.copy(model)
    rounding.bf16 = True
    users = rounding.encoder()(batch).user, rounded
    errors = [float((user.float() - exact).norm() / exact.norm()) for user in users]
    assert 0 < errors[0] < 1.25 * errors[1] < 0.1, errors
    assert (model.encoder()(batch).user - exact).norm() / exact.norm() < 1e-5


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_the_fused_lora_is_pefts_layer(dropout):
    """Parameters, outputs and gradients as the layer of peft, dropout drawn alike."""
    from peft.tuners.lora import Linear

    from models.lora import FusedLinear

    model = small_model(strategy="lora").train()
    fused = [module for module in model.modules() if type(module) is FusedLinear]
    assert len(fused) == 4 * len(TARGETS)
    assert Linear not in map(type, model.modules())
    for layer in fused[:3]:
        if dropout:
            layer.lora_dropout["default"] = torch.nn.Dropout(dropout)
        x = torch.randn(7, layer.in_features, dtype=torch.float64, requires_grad=True)
        inputs = [x, layer.lora_A["default"].weight, layer.lora_B["default"].weight]
        results = []
        for forward in (FusedLinear.forward, Linear.forward):
            torch.manual_seed(5)
            out = forward(layer, x)
            results.append((out, torch.autograd.grad(out.square().sum(), inputs)))
        torch.testing.assert_close(*results, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_bfloat16_with_full_training_is_as_near_as_the_plain_form(seed):
    """Under autocast the residual stream stays in float32, as Hugging Face's does."""
    model = small_model(layers=8, n_blocks=4, seed=seed)
    plain, _ = plain_twin(model, None)
    batch = histories([3, 8, 1, 5, 8, 2] * 4)
    with torch.no_grad():
        exact = plain.double()(batch).states
        model, plain = model.float(), plain.float()
        with torch.autocast("cpu", torch.bfloat16):
            ours, theirs = model(batch).states, plain(batch).states
    error, expected = ((x.double() - exact).norm() for x in (ours, theirs))
    assert error <= 1.1 * expected


@pytest.mark.parametrize("kv_heads", [2, 4])
def test_attention_on_grids_equals_the_flash_kernels_and_a_plain_softmax(kv_heads):
    """The form that other devices take, on users of three groups; outputs and gradients."""
    lengths, n_prompt, width = [3, 8, 1, 5] * 20, 4, 6
    packed = Packed.of(histories(lengths), 23, n_prompt)
    attention = SimpleNamespace(scaling=0.4, num_key_value_groups=4 // kv_heads)
    layer = SimpleNamespace(self_attn=attention)
    torch.manual_seed(0)
    shapes = (sum(lengths), 4), *[(sum(lengths), kv_heads)] * 2, *[(n_prompt, kv_heads)] * 2
    exact = {"dtype": torch.float64, "requires_grad": True}
    given = [torch.randn(*shape, width, **exact) for shape in shapes]
    slope = torch.randn(sum(lengths), 4, width, dtype=torch.float64)

    def plain(query, key, value, known_key, known_value):
        outputs = []
        users = sorted(lengths)
        for q, k, v in zip(*(t.split(users) for t in (query, key, value))):
            k, v = torch.cat([known_key, k]), torch.cat([known_value, v])
            k, v = (t.repeat_interleave(4 // kv_heads, dim=1) for t in (k, v))
            scores = torch.einsum("qhd,khd->hqk", q, k) * 0.4
            later = torch.ones(len(q), len(k)).triu(n_prompt + 1).bool()
            weight = scores.masked_fill(later, -torch.inf).softmax(-1)
            outputs.append(torch.einsum("hqk,khd->qhd", weight, v))
        return torch.cat(outputs)

    def ours(form):
        return lambda q, *t: form(layer, q, t[:2], t[2:], packed.groups)

    def last(form):  # from the users' last tokens alone
        return lambda q, *t: ours(form)(q[packed.last], *t)

    found = []
    for form in (plain, ours(attend), ours(attend_on_grids)):
        output = form(*given)
        found.append([output, *torch.autograd.grad((output * slope).sum(), given)])
    of_last = [lambda *t: plain(*t)[packed.last], last(attend_last), last(attend_last_on_grids)]
    for i, form in enumerate(of_last):
        output = form(*given)
        slopes = torch.autograd.grad((output * slope[packed.last]).sum(), given)
        found[i] += [output, *slopes]
    for expected, *others in zip(*found):
        for other in others:
            torch.testing.assert_close(other, expected, atol=1e-11, rtol=1e-11)
