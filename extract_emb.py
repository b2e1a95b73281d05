"""Step 2: write the item table, the pickle that the LLM steps (and the released code) read.

    python extract_emb.py                                      # demo domain, a few seconds
    python extract_emb.py --domain_type cloth
    python extract_emb.py --domain_type cloth --sasrec runs/my_sasrec --item_table runs/my_item.pkl
    python extract_emb.py --domain_type cloth --sasrec runs/a,runs/b --item_table runs/both.pkl

Reads data/<domain>.csv and output/<domain>/sasrec/best/; writes output/<domain>/sasrec_item.pkl and
sasrec_item.json. Of several SASRecs the tables stand side by side, each scaled so that its model's
scores have the models' mean standard deviation. experiments/titles.py makes a table from titles.
"""

from pathlib import Path

from engine import cli
from utils import flags


@cli.command
def main(*, files: flags.ExtractFiles) -> dict:
    """Write an item table: row i is the vector of item id i, ids that occur nowhere have zeros."""
    # 1. The request.
    from datasets.domain import Domain, split_of
    from datasets.inputs import read_sequences, replaceable_table

    runs = Domain.of(files).sasrecs(files.sasrec)
    inputs = read_sequences(files, runs[0].flags)
    domain, data = inputs.domain, inputs.data
    path = Path(files.item_table or domain.item_table)
    there = replaceable_table(path, "sasrec")
    split = split_of(there.get("sasrec_flags", {}))
    same = not there or files.item_table or split == domain.split
    cli.check((same, f"{path} is a table of --split={split}; name another file with --item_table"))
    for run in runs:
        run.check_same(inputs)
        run.report_unfinished("--sasrec")

    # 2. The models and their tables.
    import torch

    from datasets.item_table import check_size, write_table
    from datasets.sequences import some_histories
    from models.sasrec import SASRec
    from utils.evaluation import score_spreads

    models = [SASRec.load(run) for run in runs]
    tables = [model.item_table.detach() for model in models]  # each [N, D]
    check_size(inputs.csv_path, data.item_ids, sum(table.shape[1] for table in tables))
    scales = [1.0]
    if runs[1:]:
        spreads = score_spreads(models, some_histories(data, models))
        mean = sum(spreads) / len(spreads)
        scales = [spread / mean for spread in spreads]
    rows = torch.cat([table / scale for table, scale in zip(tables, scales)], dim=1)

    # 3. The file.
    starts = [run.config.get("init_table_sha256") for run in runs]
    started = sum(bool(run.flags.get("init_table")) for run in runs)
    kind = "SASRec started from a table" if started else "SASRec"
    if runs[1:]:
        kind = f"{len(runs)} SASRecs" + f", {started} started from a table" * bool(started)
    about = {
        "items_from": kind,
        "sasrec": ",".join(str(run.folder) for run in runs),
        "sasrec_sha256": ",".join(run.weights_sha256() for run in runs),
        "sasrec_flags": runs[0].flags,
        "sasrecs": [run.flags | {"init_table": init} for run, init in zip(runs, starts)],
        "scales": scales,
        "domain": domain.name,
        "data_sha256": data.sha256,
        "items_sha256": inputs.items_sha256(),
    }
    print(f"from {about['sasrec']}")
    return write_table(path, data.item_ids, rows, about)


if __name__ == "__main__":
    cli.run(main)
