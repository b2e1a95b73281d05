"""Step 1: train SASRec, whose item table every later step reads.

    python train_sr_trad.py                                              # the demo domain, about a minute on 2 cores
    python train_sr_trad.py --domain_type cloth                          # data/cloth.csv[.gz|.xz]
    python train_sr_trad.py --domain_type cloth --train_targets last --init_std 1 --learning_rate 1e-4 --batch_size 1024 \
        --num_epochs 50 --patience 0 --seed 9999                         # as first released
    python train_sr_trad.py --domain_type cloth --eval_only              # metrics of best/ again

Reads data/<domain>.csv; writes output/<domain>/sasrec/ (best/, last/, config.json, metrics.jsonl, results.json, ranks.npz).
"""

from pathlib import Path
from typing import Literal

from utils import cli

PROTOCOL = ("max_seq_length", "num_candidates", "candidate_seed")
SHAPE = ("max_seq_length", "emb_dim", "hid_dim", "num_blocks", "num_heads", "dropout", "norm", "init_std")


@cli.command
def main(
    *,
    # data
    domain_type: str = "demo",
    data_path: str | None = None,
    output_dir: str | None = None,
    max_seq_length: cli.PositiveInt = 30,
    train_targets: Literal["last", "all"] = "all",
    # model
    emb_dim: cli.PositiveInt = 128,
    hid_dim: cli.PositiveInt = 32,
    num_blocks: cli.PositiveInt = 2,
    num_heads: cli.PositiveInt = 1,
    dropout: cli.DropRate = 0.5,
    norm: Literal["query", "pre", "post"] = "query",
    init_std: cli.PositiveFloat = 0.02,
    # training
    loss: Literal["full", "sampled"] = "full",
    num_negatives: cli.PositiveInt = 256,
    batch_size: cli.PositiveInt = 256,
    micro_batch_size: cli.PositiveInt | None = None,
    num_epochs: cli.PositiveInt = 200,
    max_steps: cli.MaxSteps = -1,
    learning_rate: cli.PositiveFloat = 1e-3,
    lr_scheduler: Literal["cosine", "linear", "constant"] = "constant",
    warmup_steps: cli.NonNegativeInt = 0,
    weight_decay: cli.NonNegativeFloat = 0.0,
    max_grad_norm: cli.NonNegativeFloat = 0.0,
    patience: cli.NonNegativeInt = 10,
    # evaluation and logs
    eval_steps: cli.Interval = -1,
    save_steps: cli.Interval = -1,
    eval_batch_size: cli.PositiveInt = 512,
    num_candidates: cli.PositiveInt = 999,
    candidate_seed: cli.NonNegativeInt = 42,
    log_steps: cli.PositiveInt = 50,
    tensorboard: bool = False,
    # run
    device: Literal["auto", "cpu", "cuda"] = "auto",
    bf16: bool = False,
    seed: cli.Seed = 42,
    eval_only: bool = False,
    overwrite: bool = False,
) -> dict:
    """Train SASRec on a domain's sequences and report popularity beside it.

    Args:
        domain_type: the domain; its CSV is data/<domain>.csv[.gz|.xz] or in dataset/sequential/; demo is made on first use.
        data_path: the CSV itself, wherever it is.
        output_dir: this run's folder; output/<domain>/sasrec by default.
        max_seq_length: how many of the last items are read.
        train_targets: every position is a target (all) or one item a user (last, as released).
        emb_dim, hid_dim: width of the item table and of the transformer, with projections between them unless equal.
        num_blocks, num_heads, dropout: of the transformer.
        norm: query (released), pre or post.
        init_std: spread of the embeddings at the start (1 as released; all-position training does not take off with it).
        loss: cross-entropy over the whole catalogue (full) or over the target and uniform negatives (sampled).
        num_negatives: with sampled, how many negatives a user; its positions share them.
        batch_size: users an optimizer step.
        micro_batch_size: users at once; gradients accumulate to batch_size (default: all at once).
        num_epochs: how long to train.
        max_steps: optimizer steps instead of num_epochs; -1 for none.
        learning_rate, lr_scheduler, warmup_steps, weight_decay: of AdamW.
        max_grad_norm: clip gradients to this norm; 0 for not.
        patience: evaluations without a better validation MRR before stopping; 0 for never.
        eval_steps, save_steps: steps between evaluations, and between writing last/; -1 for every epoch.
        eval_batch_size: users at once in evaluation.
        num_candidates, candidate_seed: the sampled protocol's negatives and their draw, the same for all models and seeds.
        log_steps: steps between lines of metrics.jsonl.
        tensorboard: also write TensorBoard events.
        device: auto is cuda where there is one.
        bf16: autocast to bfloat16.
        seed: of new weights, sample order and dropout.
        eval_only: evaluate best/ and write results.json; train nothing.
        overwrite: start anew in a folder that holds a run.
    """
    flags = dict(locals())
    from datasets.demo import ensure_demo
    from datasets.interactions import canonical_domain, find_csv, read_csv
    from utils import runlog

    domain = canonical_domain(domain_type)
    folder = Path(output_dir or f"output/{domain}/sasrec")
    cli.check(
        (hid_dim % num_heads == 0, f"--num_heads={num_heads} does not divide --hid_dim={hid_dim}"),
        *([] if eval_only else [cli.divides(micro_batch_size=micro_batch_size, batch_size=batch_size)]),
    )
    runlog.check_output_dir(folder, "sasrec", flags, overwrite=overwrite, eval_only=eval_only)
    if eval_only:
        flags |= runlog.recorded(folder, flags, cli.defaults(main), (*SHAPE, *PROTOCOL, "train_targets"))
    ensure_demo(domain, data_path)
    csv_path = find_csv(domain, data_path)
    data = read_csv(csv_path)
    if eval_only:
        runlog.check_same(folder, {"data_sha256": data.sha256}, csv_path)

    import torch

    from datasets import sequences
    from models.losses import catalogue_cross_entropy, sampled_cross_entropy
    from models.sasrec import SASRec
    from utils import checkpoint, training
    from utils.evaluation import finish, ranker
    from utils.metrics_log import MetricsLog

    where = training.choose_device(device)
    config = {"step": "sasrec", "domain": domain, "data_sha256": data.sha256, "flags": flags}
    resume = not eval_only and runlog.unfinished(folder, config, overwrite)
    torch.manual_seed(seed)
    every_position = flags["train_targets"] == "all"
    model = SASRec(data.n_items, **{name: flags[name] for name in SHAPE}).to(where)
    # with `all` every position of the same window is a target, so both read the same samples
    samples, splits = sequences.prepare(data, "last", **{name: flags[name] for name in PROTOCOL})
    ranks = ranker(lambda: model, model.item_table, splits, eval_batch_size, where)

    def loss_fn(rows):
        history = samples.histories(rows).to(where)
        if every_position:
            states, targets = model.states(history), samples.shifted_targets(rows).to(where)  # [B, L, D], [B, L]
        else:
            states, targets = model(history)[:, None], samples.targets(rows)[:, None].to(where)  # [B, 1, D], [B, 1]
        if loss == "sampled":
            negatives = torch.randint(data.n_items, (len(rows), num_negatives), device=where)  # from --seed's stream, as dropout
            return {"total": sampled_cross_entropy(states, model.item_table, targets, negatives)}
        real = targets != data.n_items
        return {"total": catalogue_cross_entropy(states[real], model.item_table, targets[real])}

    fitted = None
    if not eval_only:
        runlog.start(folder, config, resume, overwrite)
        fitted = training.fit(
            module=model, loss_fn=loss_fn, counts=samples.counts(every_position), users_of=lambda rows: sequences.users_of(data, samples, rows), ranks_of=ranks,
            folder=folder, log=MetricsLog(folder, tensorboard), meta={"items": data.n_items}, resume=resume, bf16=bf16, **training.settings(flags),
        )  # fmt: skip
    weights, _ = checkpoint.load(folder / "best")
    checkpoint.restore(model, weights, folder / "best")
    model.eval()
    counts = sequences.popularity(data).to(where)[:, None]  # [N, 1]: a one-dimensional item table

    by_popularity = ranker(lambda: lambda history: counts.new_ones(len(history), 1), counts, splits, eval_batch_size, where)
    about = runlog.about(folder, "sasrec", model, fitted, checkpoint.weights_sha256(folder / "best")) | {
        "popularity": {split: by_popularity(split).metrics() for split in splits},
        "candidates": splits["test"].candidate_counts(),
    }
    return finish(folder, ranks, about)


if __name__ == "__main__":
    cli.run(main)
