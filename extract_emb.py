"""Step 2: write SASRec's item table as the pickle that the LLM steps (and the released code) read.

    python extract_emb.py                                      # demo domain, a few seconds
    python extract_emb.py --domain_type cloth
    python extract_emb.py --domain_type cloth --sasrec runs/my_sasrec --item_table runs/my_item.pkl

Reads data/<domain>.csv and output/<domain>/sasrec/best/; writes output/<domain>/sasrec_item.pkl and
sasrec_item.json.
"""

from pathlib import Path

from utils import cli
from utils.flags import ExtractFiles


@cli.command
def main(*, files: ExtractFiles) -> dict:
    """Spread SASRec's item embeddings over the item ids of the domain's CSV; ids that occur nowhere
    get zeros.
    """
    from datasets.domain import Domain
    from utils.files import check_writable
    from utils.run import Run

    domain = Domain.of(files)
    folder = Path(files.sasrec or domain.folder / "sasrec")
    path = Path(files.item_table or domain.item_table)
    cli.check(
        (
            (folder / "best").is_dir(),
            f"SASRec checkpoint not found: {folder / 'best'}; train_sr_trad.py writes it"
            " (or name a run with --sasrec)",
        ),
        (path.suffix == ".pkl", f"--item_table={path}: must end in .pkl"),
    )
    check_writable(path.parent, "--item_table")
    run = Run.read("sasrec", folder, "--sasrec")
    data, csv_path = domain.read_as_in(run.flags).read()
    run.check_same({"data_sha256": data.sha256}, csv_path)

    import torch  # late, so that a wrong request is answered at once

    from datasets.item_table import check_size, write_table
    from utils import checkpoint

    weights, meta = checkpoint.load(folder / "best")
    run.report_unfinished()
    if "item_embedding.weight" not in weights:
        raise cli.UsageError(
            f"{folder / 'best'}: no item_embedding.weight,"
            f" found {', '.join(sorted(weights)[:4])}; not a SASRec run"
        )
    trained = weights["item_embedding.weight"][: data.n_items]  # the last row is the padding
    check_size(csv_path, data.item_ids, trained.shape[1])
    n_rows = int(data.item_ids[-1]) + 1
    table = torch.zeros(n_rows, trained.shape[1])
    table[torch.from_numpy(data.item_ids)] = trained
    about = {
        "domain": domain.name,
        "dim": table.shape[1],
        "rows": n_rows,
        "items": data.n_items,
        "data_sha256": data.sha256,
        "sasrec": str(folder),
        "sasrec_step": meta["step"],
        "sasrec_sha256": checkpoint.weights_sha256(folder / "best"),
        "sasrec_flags": run.flags,
    }
    write_table(path, table, about)
    print(
        f"wrote {path}: {n_rows:,} rows x {table.shape[1]}, {data.n_items:,} of them items,"
        f" from {folder} step {meta['step']}"
    )
    return about


if __name__ == "__main__":
    cli.run(main)
