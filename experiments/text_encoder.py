"""An encoder of titles: an LLM's first layers, tuned on items that users met one after another.

    make smollm2
    python -m experiments.text_encoder --domain_type beauty --output_dir output/base/encoder
    python -m experiments.titles --domain_type beauty --text_model output/base/encoder

An item's vector is the mean of its title's last states, as in LLM2Rec (arXiv 2506.21579). Items
that stand near each other in a history are pulled together, the others of the batch apart (InfoNCE,
arXiv 1807.03748). Training items alone are read, never validation or test targets. The package
sentence-transformers reads the folder, and takes the mean by itself.

Legend: n items of a batch, T tokens, W width.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from engine import cli
from engine.cli import NonNegativeInt, PositiveFloat, PositiveInt, Seed, flag
from engine.files import check_writable, let_all_read, making, replace_folder
from engine.log import MetricsLog
from utils.flags import Data

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from datasets.sequences import Samples

WINDOW = 12  # last training items of a user
REACH = 2  # neighbours are at most so far apart; their weight is 1 / distance
TOKENS, ROUND, CHUNK = 40, 8, 64  # of a title at most; lengths are rounded up; titles at once
WARM_UP, WEIGHT_DECAY = 40, 0.01  # steps; of AdamW


def batches(samples: "Samples", n_items: int, seed: int) -> "Iterator[tuple[np.ndarray, Tensor]]":
    """Items [n] of some users, at least `n_items`, and how near each pair stands [n, n]; without
    end. 0 for a pair that no history holds.
    """
    import torch

    rng = np.random.default_rng(seed)
    lists: list[np.ndarray] = []
    while True:
        for user in rng.permutation(len(samples)):
            end, length = samples.end[[user]] + 1, samples.length[[user]] + 1
            items = samples.windows(end, length, WINDOW)[0].numpy()
            lists.append(items[items < samples.data.n_items])
            found = np.unique(np.concatenate(lists))
            if len(found) < min(n_items, samples.data.n_items // 2):
                continue
            near = torch.zeros(len(found), len(found))
            for items in lists:
                place = torch.from_numpy(np.searchsorted(found, items))
                for distance in range(1, REACH + 1):
                    pairs = place[:-distance], place[distance:]
                    share = torch.full((max(0, len(place) - distance),), 1 / distance)
                    near.index_put_(pairs, share, accumulate=True)
                    near.index_put_(pairs[::-1], share, accumulate=True)
            yield found, near.fill_diagonal_(0)
            lists = []


def encoded(model: Callable, tokens: list[list[int]], device: "torch.device") -> "Tensor":
    """Mean states of titles, float32 [n, W].

    Args:
        tokens: of each title, at least one.
    """
    import torch

    order = sorted(range(len(tokens)), key=lambda i: len(tokens[i]))
    parts = []
    for start in range(0, len(order), CHUNK):  # always CHUNK rows, so that few shapes are compiled
        rows = [tokens[i] for i in order[start : start + CHUNK]]
        length = -(-len(rows[-1]) // ROUND) * ROUND
        ids = torch.zeros(CHUNK, length, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        mask[len(rows) :, 0] = 1  # a row needs a token
        for row, text in enumerate(rows):
            ids[row, : len(text)], mask[row, : len(text)] = torch.tensor(text), 1
        ids, mask = ids.to(device), mask.to(device)
        states = model(input_ids=ids, attention_mask=mask).last_hidden_state.float()
        used = mask[..., None].float()
        parts.append(((states * used).sum(1) / used.sum(1))[: len(rows)])
    back = torch.tensor(order).argsort().to(device)
    return torch.cat(parts)[back]


def info_nce(vectors: "Tensor", near: "Tensor", temperature: float) -> "Tensor":
    """Mean cross-entropy of near pairs, among all other items of the batch.

    Args:
        vectors: [n, W]; their cosines are compared. near: weights [n, n], 0 on the diagonal.
    """
    import torch
    import torch.nn.functional as F

    vectors = F.normalize(vectors, dim=1)
    own = torch.eye(len(vectors), dtype=torch.bool, device=vectors.device)
    scores = (vectors @ vectors.T / temperature).masked_fill(own, -torch.inf)
    each = scores.log_softmax(1).masked_fill(own, 0.0)
    return -(near * each).sum() / near.sum()


class Nearest:
    """The recommender of the items nearest to a user's last one, by cosine without the mean.

    Args:
        vectors: [N, W].
    """

    def __init__(self, vectors: "Tensor") -> None:
        centred = vectors - vectors.mean(0)
        self.item_table = centred / centred.norm(dim=1, keepdim=True)

    def user_encoder(self) -> "Callable[[Tensor], Tensor]":
        return lambda history: self.item_table[history[:, -1].to(self.item_table.device)]


@cli.command
def main(
    *,
    data: Data,
    base_model: str = flag("smollm2", "a base as finetune.py reads it"),
    output_dir: str = flag(help="the folder of the encoder; it must not exist"),
    layers: PositiveInt = flag(4, "first layers that are kept"),
    steps: PositiveInt = flag(900, "optimizer steps"),
    batch_items: PositiveInt = flag(448, "items per step, at most half of the catalogue"),
    learning_rate: PositiveFloat = flag(2e-4, "peak learning rate of AdamW, then cosine"),
    temperature: PositiveFloat = flag(0.05, "of the cosines"),
    eval_steps: NonNegativeInt = flag(150, "steps between validations; 0 for the end alone"),
    seed: Seed = flag(0, "of the order of users"),
    bf16: bool = flag(False, "compute products in bfloat16"),
    compile: bool = flag(False, "compile the layers"),
    device: Literal["auto", "cpu", "cuda"] = flag("auto", "auto uses cuda if available"),
) -> Path:
    """Tune an encoder of titles, for experiments.titles."""
    from datasets.inputs import read_sequences

    folder, inputs = Path(output_dir), read_sequences(data)
    cli.check((not folder.exists(), f"--output_dir={folder}: already exists"))
    check_writable(folder.parent, "--output_dir")

    import torch
    from tqdm import tqdm
    from transformers import AutoTokenizer

    from datasets.items import Items
    from datasets.sequences import evaluation_splits, training_samples
    from engine import processes
    from models.base import load_llama, open_base
    from utils.evaluation import evaluate
    from utils.flags import Evaluation, Runtime

    items = Items.of(inputs.csv_path, inputs.data.item_ids)
    base, device = open_base(base_model), processes.choose_device(device)
    most = base.config.num_hidden_layers
    cli.check(
        (any(items.titles), f"{inputs.csv_path}: no item has a title; see docs/data.md"),
        (layers <= most, f"--layers={layers}: {base_model} has {most}"),
    )
    tokenizer = AutoTokenizer.from_pretrained(base.location)
    tokenizer.model_max_length = TOKENS
    if tokenizer.pad_token is None:  # sentence-transformers pads
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    texts = tokenizer(items.titles, truncation=True)["input_ids"]
    tokens = [text or [tokenizer.pad_token_id] for text in texts]
    model = load_llama(base.location, base.config, [*range(layers)], torch.float32).to(device)
    model.set_attn_implementation("eager")  # titles are short
    model.embed_tokens.requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=WEIGHT_DECAY)
    forward = torch.compile(model, dynamic=True) if compile else model
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=bf16)
    valid = evaluation_splits(inputs.data, WINDOW, Evaluation())["valid"]

    def validate(step: int) -> None:
        with torch.no_grad(), autocast:
            vectors = encoded(model.eval(), tokens, device)
        found = evaluate(Nearest(vectors), valid, Runtime()).metrics()["full"]
        log.add("valid", step, found)
        tqdm.write(f"step {step}: nearest items to the last one, valid HR@10 {found['HR@10']:.4f}")

    folder.mkdir(parents=True)
    log = MetricsLog(folder, tensorboard=False)
    validate(0)
    drawn = batches(training_samples(inputs.data, "last", WINDOW), batch_items, seed)
    with tqdm(total=steps, unit="step", dynamic_ncols=True, mininterval=1.0) as bar:
        for step, (found, near) in zip(range(1, steps + 1), drawn):
            rise, left = min(1.0, step / WARM_UP), 0.5 * (1 + np.cos(np.pi * step / steps))
            optimizer.param_groups[0]["lr"] = learning_rate * min(rise, left)
            model.train()
            with autocast:
                vectors = encoded(forward, [tokens[item] for item in found], device)
            loss = info_nce(vectors, near.to(device), temperature)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            bar.set_postfix(loss=f"{loss.item():.3f}")
            bar.update()
            log.add("train", step, {"loss": loss.item()})
            if step == steps or (eval_steps and step % eval_steps == 0):
                validate(step)
    with making(folder) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        log.path.rename(partial / log.path.name)
        let_all_read(partial)
        replace_folder(partial, folder)
    print(f"wrote {folder}: {layers} layers of {base_model}")
    return folder


if __name__ == "__main__":
    cli.run(main)
