"""Step 1: train SASRec, whose item table every later step reads.

    python train_sr_trad.py              # demo domain: a minute on 2 cores, sampled HR@10 .74
    python train_sr_trad.py --max_steps 20 --output_dir runs/try   # a few seconds, to see it run
    python train_sr_trad.py --domain_type cloth                          # data/cloth.csv[.gz|.xz]
    python train_sr_trad.py --domain_type cloth --train_targets last --init_std 1 \
        --learning_rate 1e-4 --batch_size 1024 --num_epochs 50 --patience 0 --seed 9999
    python train_sr_trad.py --domain_type beauty --init_table output/beauty/titles_item.pkl
    python train_sr_trad.py --domain_type cloth --eval_only              # metrics of best/ again

Reads data/<domain>.csv; writes output/<domain>/sasrec/ (best/, last/, config.json, metrics.jsonl,
results.json, ranks.npz).
"""

from pathlib import Path

from utils import cli, flags


@cli.command
def main(
    *,
    files: flags.SASRecFiles,
    sequence: flags.Sequence,
    sasrec: flags.SASRecModel,
    objective: flags.Objective,
    training: flags.Training = flags.Training(
        train_targets="all",
        num_epochs=200,
        lr_scheduler="constant",
        warmup_steps=0,
        max_grad_norm=0.0,
        patience=10,
        eval_steps=-1,
        bf16=False,
    ),
    evaluation: flags.Evaluation,
    runtime: flags.Runtime = flags.Runtime(save_steps=-1, log_steps=50),
) -> dict:
    """Train SASRec on a domain's sequences and report popularity beside it."""
    from datasets.domain import Domain
    from utils.files import file_sha256
    from utils.run import Run

    domain = Domain.of(files)
    folder = Path(files.output_dir or domain.folder / "sasrec")
    there = files.init_table is None or Path(files.init_table).is_file()
    cli.check(
        cli.divides(training, runtime), (there, f"--init_table={files.init_table}: file not found")
    )
    groups = files, sequence, sasrec, objective, training, evaluation, runtime
    run = Run.open("sasrec", folder, *groups)
    if run.eval_only:
        sequence, sasrec, evaluation = run.recorded(sequence, sasrec, evaluation)
    data, csv_path = domain.read()
    hashes = {"data_sha256": data.sha256}
    start = {"init_table_sha256": file_sha256(files.init_table) if files.init_table else None}
    if run.is_finished(hashes | start):
        return run.results()

    import torch  # imported late: bad flags fail at once

    from datasets import item_table, sequences
    from models.catalogue import catalogue_cross_entropy
    from models.losses import draw_negatives, sampled_cross_entropy
    from models.sasrec import SASRec
    from utils import processes
    from utils.evaluation import ranker
    from utils.training import fit

    item_table.check_size(csv_path, data.item_ids, sasrec.emb_dim)  # before hours of training
    device = processes.choose_device(runtime.device, run.threads)
    every_position = training.train_targets == "all"  # one sample per user, with all its targets
    samples, splits = sequences.prepare(data, "last", sequence, evaluation, every_position)
    if run.eval_only:
        run.check_same(hashes, csv_path)
    else:
        run.prepare(domain=domain.name, **hashes, **start)
    torch.manual_seed(run.seed)
    model = SASRec(data.n_items, sequence.max_seq_length, **sasrec.values())
    if files.init_table and not run.eval_only:
        model.start_items(item_table.read_table(files.init_table, data.item_ids), sasrec.init_std)
    model.to(device)
    table = model.item_table  # [N, D], trained
    ranks_of = ranker(table, splits, runtime.eval_batch_size, device)(lambda: model)

    def loss_fn(indices):
        history = samples.histories(indices)
        if every_position:
            states = model.states(history)  # [B, L, D]
            targets = samples.shifted_targets(indices).to(device)  # [B, L]
        else:
            states = model(history)[:, None]  # [B, 1, D]
            targets = samples.targets(indices)[:, None].to(device)  # [B, 1]
        negatives = draw_negatives(objective, len(indices), data.n_items, device)
        if negatives is not None:
            loss = sampled_cross_entropy(states, model.item_table, targets, negatives)
        else:
            real = targets != data.n_items
            loss = catalogue_cross_entropy(states[real], model.item_table, targets[real])
        return {"total": loss}

    fitted = None
    if not run.eval_only:
        if run.starts_from:
            model.restore(run.starts_from)
        run.begin()
        meta = {"items": data.n_items}
        bf16 = training.bf16
        fitted = fit(
            run, model, loss_fn, samples, ranks_of, training, runtime, bf16=bf16, meta=meta
        )
    model.restore(run)
    model.eval()
    counts = sequences.popularity(data).to(device)[:, None]  # [N, 1]: a table of width one

    def encode_constant(history):
        return counts.new_ones(len(history), 1)

    by_popularity = ranker(counts, splits, runtime.eval_batch_size, device)(lambda: encode_constant)
    return run.finish(
        model,
        ranks_of,
        data.users,
        fitted,
        popularity={split: by_popularity(split).metrics() for split in splits},
        candidates=splits["test"].candidate_counts(),
    )


if __name__ == "__main__":
    cli.run(main)
