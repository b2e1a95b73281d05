import math

import numpy as np
import pytest
import torch

import extract_emb
import finetune
import train_sr_trad
from datasets.interactions import read_csv
from models.sasrec import SASRec
from tests.conftest import SHORT, assert_resumes, histories

SHAPE = {"emb_dim": 6, "hid_dim": 4, "num_blocks": 2, "num_heads": 2, "dropout": 0.5}
SHAPE |= {"init_std": 0.7}


def made(kind="query", **changes):
    torch.manual_seed(0)
    if kind == "bsarec":
        kind, changes = "query", changes | {"alpha": 0.7, "low_frequencies": 2}
    model = SASRec(23, 8, norm=kind, **(SHAPE | changes)).double().eval()
    with torch.no_grad():  # norms that do something
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    return model


def numpy_states(model, items):
    """The same forward for one unpadded sequence, written out in numpy."""
    w = {name: p.detach().numpy() for name, p in model.named_parameters()}
    n, heads = len(items), model.blocks[0].num_heads
    bsarec = "first_norm.weight" in w

    def linear(x, name):
        if f"{name}.weight" not in w:  # no bottleneck, no projection
            return x
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def layer_norm(x, name):
        centred = x - x.mean(-1, keepdims=True)
        normed = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-8)
        return normed * w[f"{name}.weight"] + w[f"{name}.bias"]

    def attend(query, source, name):
        given = (query, "query"), (source, "key"), (source, "value")
        q, k, v = (linear(x, f"{name}.{part}") for x, part in given)
        out = np.zeros_like(q)
        for head in range(heads):
            d = q.shape[1] // heads
            part = slice(head * d, head * d + d)
            for t in range(n):
                score = q[t, part] @ k[: t + 1, part].T / np.sqrt(d)
                weight = np.exp(score - score.max())
                out[t, part] = weight / weight.sum() @ v[: t + 1, part]
        return linear(out, f"{name}.out")

    def filtered(source, name):
        slots = np.zeros((model.max_seq_length, source.shape[1]))
        slots[-n:] = source  # left-padded, as BSARec's
        terms = np.fft.rfft(slots, axis=0, norm="ortho")
        terms[2:] = 0
        low = np.fft.irfft(terms, n=len(slots), axis=0, norm="ortho")[-n:]
        return low + w[f"{name}.frequencies.root"] ** 2 * (source - low)

    def feed(x, name):
        return linear(np.maximum(linear(x, f"{name}.feed.0"), 0), f"{name}.feed.3")

    def wide_feed(x, name):
        inner = linear(x, f"{name}.feed.0")
        inner = inner * (1 + np.vectorize(math.erf)(inner / np.sqrt(2))) / 2
        return linear(inner, f"{name}.feed.2")

    x = linear(w["item_embedding.weight"][items], "to_hidden")
    if bsarec:
        x = layer_norm(x + w["positions.weight"][-n:], "first_norm")
    else:
        x = x * np.sqrt(model.item_embedding.embedding_dim) + w["positions.weight"][-n:]
    for i in range(2):
        b = f"blocks.{i}"
        if bsarec:
            x, of_low = (
                layer_norm(x + mixed, f"{b}.{norm}_norm")
                for mixed, norm in ((attend(x, x, b), "attention"), (filtered(x, b), "frequency"))
            )
            x = 0.3 * x + 0.7 * of_low
            x = layer_norm(x + wide_feed(x, b), f"{b}.feed_norm")
        elif model.blocks[0].norm == "query":
            q = layer_norm(x, f"{b}.attention_norm")
            x = layer_norm(q + attend(q, x, b), f"{b}.feed_norm")
            x = x + feed(x, b)
        elif model.blocks[0].norm == "pre":
            q = layer_norm(x, f"{b}.attention_norm")
            x = x + attend(q, q, b)
            x = x + feed(layer_norm(x, f"{b}.feed_norm"), b)
        else:
            x = layer_norm(x + attend(x, x, b), f"{b}.attention_norm")
            x = layer_norm(x + feed(x, b), f"{b}.feed_norm")
    return linear(x if bsarec else layer_norm(x, "final_norm"), "to_item")


KINDS = ["query", "pre", "post", "bsarec"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("hid_dim", [4, 6])
def test_an_independent_numpy_forward_agrees(kind, hid_dim):
    model = made(kind, hid_dim=hid_dim)
    assert ("to_item.weight" in model.state_dict()) == (hid_dim == 4)
    items = [4, 0, 22, 7, 4]
    padded = torch.tensor([[23, 23, 23, *items]])
    states = model.states(padded).detach().numpy()
    np.testing.assert_allclose(states, numpy_states(model, items), atol=1e-12)
    np.testing.assert_allclose(model(padded)[0].detach().numpy(), states[-1], atol=0)


def test_padding_gets_no_gradient_and_is_no_class():
    model, batch = made().train(), histories([2, 8])
    model.states(batch).sum().backward()
    assert model.item_embedding.weight.grad[23].abs().sum() == 0
    assert model.item_table.shape == (23, 6)


@pytest.mark.parametrize("kind", KINDS)
def test_packed_states_and_gradients_equal_the_padded_ones(kind):
    """More users than a group of attention has, in no order of length."""
    lengths = [1, 8, 3, 3, 5, 2, 8, 1, 4, 6, 7] * 8
    batch, model = histories(lengths), made(kind)
    slope = torch.randn(sum(lengths), 6, dtype=torch.float64)
    found = []
    for states in (model.states(batch), model.padded_states(batch)[batch != 23]):
        model.zero_grad()
        (states * slope).sum().backward()
        found.append([states.detach(), *(p.grad.clone() for p in model.parameters())])
    for packed, padded in zip(*found):
        torch.testing.assert_close(packed, padded, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(model(batch), model.padded_states(batch)[:, -1], atol=1e-13, rtol=0)


def test_dropout_of_packed_attention_drops_weights_by_the_rate(monkeypatch):
    """At rate 1 of attention nothing is mixed: every state is a function of its own item alone."""
    model, batch = made(dropout=0.0).train(), histories([8, 5, 3])
    for block in model.blocks:
        monkeypatch.setattr(block, "rate", 1.0)
    changed = batch.clone()
    changed[:, -2] = (changed[:, -2] + 1) % 23
    pairs = (model.states(histories).split([8, 5, 3]) for histories in (batch, changed))
    for own, other in zip(*pairs):
        assert torch.equal(own[-1], other[-1])
        assert not torch.allclose(own[-2], other[-2])


def test_with_frequencies_every_prefix_is_a_sample(inside, monkeypatch, capsys):
    """No earlier state is trained; the run resumes bit for bit, its vectors and softmax teach."""
    monkeypatch.setattr(SASRec, "states", None)
    flags = SHORT | {"alpha": 0.7, "save_steps": 1, "bf16": True}
    assert_resumes(monkeypatch, train_sr_trad.main, **flags)
    prefixes = int((np.diff(read_csv("data/demo.csv").offsets) - 3).sum())
    assert f"{prefixes:,} training samples" in capsys.readouterr().out
    train_sr_trad.main(**flags, train_targets="last", output_dir="last")
    assert "120 training samples" in capsys.readouterr().out
    extract_emb.main(sasrec="whole", item_table="table.pkl")
    taught = {"sasrec": "whole", "item_table": "table.pkl", "sasrec_lambda": 1.0}
    first = finetune.main(**SHORT | taught, output_dir="cached")["test"]
    live = finetune.main(**SHORT | taught, teacher_cache="off", output_dir="live")["test"]
    assert first["full"] == pytest.approx(live["full"], abs=1e-3)
