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

from engine import cli
from utils import flags


@cli.command
def main(
    *,
    files: flags.SASRecFiles,
    sequence: flags.Sequence,
    sasrec: flags.SASRecModel,
    training: flags.SASRecTraining,
    evaluation: flags.Evaluation,
    runtime: flags.Runtime = flags.Runtime(log_steps=50),
) -> dict:
    """Train SASRec on a domain's sequences and report popularity beside it."""
    # 1. The request. No torch yet: a wrong one ends here, in one line.
    from datasets.inputs import read_sequences
    from engine.run import Run

    inputs = read_sequences(files)
    folder = inputs.domain.run_folder("sasrec", files.output_dir)
    files, training = inputs.settled(files, training)
    groups = files, sequence, sasrec, training, evaluation, runtime
    run = Run.open("sasrec", folder, groups, inputs)
    if run.finished and not run.eval_only:
        return run.print_results()
    files, sequence, sasrec, training, evaluation, runtime = run.groups

    # 2. Data.
    import torch

    from datasets import candidates, item_table, sequences
    from models import losses
    from models.sasrec import SASRec
    from utils.evaluation import Popularity, evaluate, finish
    from utils.training import fit

    item_ids, n_items = inputs.data.item_ids, inputs.data.n_items
    item_table.check_size(inputs.csv_path, item_ids, sasrec.emb_dim)  # before hours of training
    device = run.choose_device()
    # A target after every item of a history, which the frequency layer would see: of its prefixes.
    every = training.train_targets == "all" and not sasrec.alpha
    data = inputs.load(sequence, training, evaluation, device, every)
    popularity = Popularity(torch.from_numpy(sequences.popularity(inputs.data)).to(device))
    beside = {
        name: evaluate(popularity, split, runtime).metrics() for name, split in data.splits.items()
    }

    # 3. The model.
    torch.manual_seed(run.seed)
    model = SASRec(n_items, sequence.max_seq_length, **sasrec.values()).to(device)
    if run.eval_only:
        return finish(run, model.restore(run), data, runtime, popularity=beside)
    run.prepare(**inputs.about)
    if files.init_table:
        model.start(inputs.vectors(files.init_table), sasrec.init_std)
    if run.source:
        model.start_from(run)

    # 4. The method: the next item, among all items or sampled ones.
    def loss_fn(batch):
        states = model.states(batch.history) if every else model(batch.history)  # [S, D] or [B, D]
        if training.loss == "sampled":
            key, k = (run.seed, batch.step), training.num_negatives
            drawn = candidates.uniform(key, batch.indices, n_items, k)  # [B, K]
            drawn = torch.from_numpy(drawn).to(device)
            given = states, model.item_table, batch.target, drawn, batch.lengths
            return {"total": losses.sampled_cross_entropy(*given)}
        return {"total": losses.next_item(states, model.item_table, batch.target)}

    with run.training():
        fitted = fit(run, model, loss_fn, model, data, training, runtime)
    return finish(run, model.restore(run), data, runtime, fitted, popularity=beside)


if __name__ == "__main__":
    cli.run(main)
