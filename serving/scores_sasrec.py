import json

import torch
import torch.nn.functional as F
from safetensors.torch import load_file

FOLDER = "."
parts = load_file(f"{FOLDER}/recommender.safetensors")
with open(f"{FOLDER}/recommender.json", encoding="utf-8") as file:
    about = json.load(file)
table = parts["item_embedding.weight"][:-1]  # the last row is the padding
shape = about["sasrec"]
alpha = shape["alpha"]  # above 0: the blocks are BSARec's


def linear(name, x):
    weight = parts.get(f"{name}.weight")  # absent where widths are equal
    return x if weight is None else F.linear(x, weight, parts[f"{name}.bias"])


def norm(name, x):
    weight = parts.get(f"{name}.weight")  # SASRec has none before its blocks, BSARec none after
    if weight is None:
        return x
    return F.layer_norm(x, weight.shape, weight, parts[f"{name}.bias"], 1e-8)


def attend(block, query, source):
    q, k, v = (
        linear(f"{block}.{name}", x).unflatten(-1, (shape["num_heads"], -1)).transpose(0, 1)
        for name, x in (("query", query), ("key", source), ("value", source))
    )
    mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return linear(f"{block}.out", mixed.transpose(0, 1).flatten(1))


def filtered(block, x):
    slots = about["max_seq_length"]
    terms = torch.fft.rfft(x, n=slots, dim=0)
    terms[shape["low_frequencies"] :] = 0
    low = torch.fft.irfft(terms, n=slots, dim=0)[: len(x)]
    return low + parts[f"{block}.frequencies.root"] ** 2 * (x - low)


def feed(block, x):
    if alpha:
        return linear(f"{block}.feed.2", F.gelu(linear(f"{block}.feed.0", x)))
    return linear(f"{block}.feed.3", linear(f"{block}.feed.0", x).relu())


def layer(block, x):
    first, second = f"{block}.attention_norm", f"{block}.feed_norm"
    if alpha or shape["norm"] == "post":
        mixed = norm(first, x + attend(block, x, x))
        if alpha:
            mixed = mixed.lerp(norm(f"{block}.frequency_norm", x + filtered(block, x)), alpha)
        return norm(second, mixed + feed(block, mixed))
    normed = norm(first, x)
    if shape["norm"] == "query":
        x = norm(second, normed + attend(block, normed, x))
        return x + feed(block, x)
    x = x + attend(block, normed, normed)
    return x + feed(block, norm(second, x))


@torch.no_grad()
def scores(history):  # lines of items.csv, from 0, oldest first -> a score for every line
    if not len(history):
        return parts["popularity"]
    x = table[history[-about["max_seq_length"] :]]
    x = linear("to_hidden", x) * (1 if alpha else table.shape[1] ** 0.5)
    x = norm("first_norm", x + parts["positions.weight"][-len(x) :])
    for i in range(shape["num_blocks"]):
        x = layer(f"blocks.{i}", x)
    return table @ linear("to_item", norm("final_norm", x))[-1]


if __name__ == "__main__":
    print(scores([0, 1, 2]).topk(10).indices.tolist())
