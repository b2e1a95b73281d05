import json

import torch
import torch.nn.functional as F
from safetensors.torch import load_file

FOLDER = "."
parts = load_file(f"{FOLDER}/recommender.safetensors")
with open(f"{FOLDER}/recommender.json", encoding="utf-8") as file:
    about = json.load(file)
table = parts["item_embedding.weight"][:-1]  # the last row is the padding


def linear(name, x):
    weight = parts.get(f"{name}.weight")  # absent where widths are equal
    return x if weight is None else F.linear(x, weight, parts[f"{name}.bias"])


def norm(name, x):
    return F.layer_norm(x, x.shape[-1:], parts[f"{name}.weight"], parts[f"{name}.bias"], 1e-8)


def attend(block, query, source):
    q, k, v = (
        linear(f"{block}.{name}", x).unflatten(-1, (about["sasrec"]["num_heads"], -1))
        for name, x in (("query", query), ("key", source), ("value", source))
    )
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return linear(f"{block}.out", mixed.transpose(0, 1).flatten(1))


def mixed(block, query, source):
    attended, alpha = attend(block, query, source), about["sasrec"]["alpha"]
    if not alpha:
        return attended
    slots = about["max_seq_length"]
    terms = torch.fft.rfft(source, n=slots, dim=0)
    terms[about["sasrec"]["low_frequencies"] :] = 0
    low = torch.fft.irfft(terms, n=slots, dim=0)[: len(source)]
    filtered = low + parts[f"{block}.frequencies.root"] ** 2 * (source - low)
    return torch.lerp(attended, filtered, alpha)


def feed(block, x):
    return linear(f"{block}.feed.3", linear(f"{block}.feed.0", x).relu())


def layer(block, x):
    first, second = f"{block}.attention_norm", f"{block}.feed_norm"
    if about["sasrec"]["norm"] == "post":
        x = norm(first, x + mixed(block, x, x))
        return norm(second, x + feed(block, x))
    normed = norm(first, x)
    if about["sasrec"]["norm"] == "query":
        x = norm(second, normed + mixed(block, normed, x))
        return x + feed(block, x)
    x = x + mixed(block, normed, normed)
    return x + feed(block, norm(second, x))


@torch.no_grad()
def scores(history):  # lines of items.csv, from 0, oldest first -> a score for every line
    if not len(history):
        return parts["popularity"]
    x = table[history[-about["max_seq_length"] :]]
    x = linear("to_hidden", x) * table.shape[1] ** 0.5 + parts["positions.weight"][-len(x) :]
    for i in range(about["sasrec"]["num_blocks"]):
        x = layer(f"blocks.{i}", x)
    return table @ linear("to_item", norm("final_norm", x))[-1]


if __name__ == "__main__":
    print(scores([0, 1, 2]).topk(10).indices.tolist())
