"""Step 2: write SASRec's item table as the pickle that the LLM steps (and the released code) read.

    python extract_emb.py                                                # the demo domain, a few seconds
    python extract_emb.py --domain_type cloth
    python extract_emb.py --domain_type cloth --sasrec runs/my_sasrec --item_table runs/my_item.pkl

Reads data/<domain>.csv and output/<domain>/sasrec/best/; writes output/<domain>/sasrec_item.pkl and sasrec_item.json.
"""

from pathlib import Path

from utils import cli

LARGEST_GIB = 16  # of a table over all ids; ten million items of 128 numbers are 5 GiB


@cli.command
def main(
    *,
    domain_type: str = "demo",
    data_path: str | None = None,
    sasrec: str | None = None,
    item_table: str | None = None,
) -> dict:
    """Spread SASRec's item embeddings over the item ids of the domain's CSV; ids that occur nowhere get zeros.

    Args:
        domain_type: the domain.
        data_path: its CSV, wherever it is.
        sasrec: the folder of the step-1 run; output/<domain>/sasrec by default.
        item_table: the file to write; output/<domain>/sasrec_item.pkl by default.
    """
    from datasets.demo import ensure_demo
    from datasets.interactions import canonical_domain, find_csv, read_csv
    from utils import runlog

    domain = canonical_domain(domain_type)
    run = Path(sasrec or f"output/{domain}/sasrec")
    path = Path(item_table or f"output/{domain}/sasrec_item.pkl")
    cli.check(
        (
            (run / "best").is_dir(),
            f"SASRec checkpoint not found: {run / 'best'}; train_sr_trad.py writes it (or name a run with --sasrec)",
        ),
        (path.suffix == ".pkl", f"--item_table={path}: must end in .pkl"),
    )
    runlog.check_place(path.parent, "--item_table")
    config = runlog.read_json(run / "config.json", "SASRec run")
    ensure_demo(domain, data_path)
    csv_path = find_csv(domain, data_path)
    data = read_csv(csv_path)
    runlog.check_same(run, {"data_sha256": data.sha256}, csv_path)

    import torch

    from utils import checkpoint, embeddings

    weights, meta = checkpoint.load(run / "best")
    runlog.tell_unfinished(run, "SASRec run")
    if "item_embedding.weight" not in weights:
        raise cli.UsageError(f"{run / 'best'}: no item_embedding.weight, found {', '.join(sorted(weights)[:4])}; not a SASRec run")
    trained = weights["item_embedding.weight"][: data.n_items]  # the last row is the padding
    gib = (int(data.item_ids[-1]) + 1) * trained.shape[1] * 4 / 2**30
    if gib > LARGEST_GIB:
        raise cli.UsageError(
            f"{csv_path}: ids reach {data.item_ids[-1]} for {data.n_items} items, a table of {gib:.0f} GiB; number the items from 0"
        )
    table = torch.zeros(int(data.item_ids[-1]) + 1, trained.shape[1])
    table[torch.from_numpy(data.item_ids)] = trained
    about = {
        "domain": domain, "dim": table.shape[1], "rows": len(table), "items": data.n_items,
        "data_sha256": data.sha256, "sasrec": str(run), "sasrec_step": meta["step"],
        "sasrec_sha256": checkpoint.weights_sha256(run / "best"), "sasrec_flags": config["flags"],
    }  # fmt: skip
    embeddings.write_table(path, table, about)
    print(f"wrote {path}: {len(table):,} rows x {table.shape[1]}, {data.n_items:,} of them items, from {run} step {meta['step']}")
    return about


if __name__ == "__main__":
    cli.run(main)
