"""Step 2: write the item table, the pickle that the LLM steps (and the released code) read.

    python extract_emb.py                                      # demo domain, a few seconds
    python extract_emb.py --domain_type cloth
    python extract_emb.py --domain_type cloth --sasrec runs/my_sasrec --item_table runs/my_item.pkl

Item vectors from titles instead of SASRec's: also for items of <domain>.items.csv that the
sequences never have.

    python extract_emb.py --domain_type beauty --source titles
    python extract_emb.py --domain_type beauty --source titles --text_model output/base/minilm

Reads data/<domain>.csv and output/<domain>/sasrec/best/; writes output/<domain>/sasrec_item.pkl and
sasrec_item.json (titles_item.pkl and titles_item.json from titles).
"""

from pathlib import Path

from utils import cli
from utils.flags import ExtractFiles, ItemVectors


def vectors_of_sasrec(files: ExtractFiles, domain):
    """SASRec's item embeddings: the data, item ids [n], vectors [n, D], and what they are from."""
    from utils.run import Run

    folder = Path(files.sasrec or domain.folder / "sasrec")
    missing = f"SASRec checkpoint not found: {folder / 'best'}; train_sr_trad.py writes it"
    cli.check(((folder / "best").is_dir(), f"{missing} (or name a run with --sasrec)"))
    run = Run.read("sasrec", folder, "--sasrec")
    data, csv_path = domain.read_as_in(run.flags).read()
    run.check_same({"data_sha256": data.sha256}, csv_path)

    from datasets.item_table import check_size
    from utils import checkpoint

    weights, meta = checkpoint.load(folder / "best")
    run.report_unfinished()
    if "item_embedding.weight" not in weights:
        found = ", ".join(sorted(weights)[:4])
        raise cli.UsageError(
            f"{folder / 'best'}: no item_embedding.weight, found {found}; not a SASRec run"
        )
    trained = weights["item_embedding.weight"][: data.n_items]  # the last row is the padding
    check_size(csv_path, data.item_ids, trained.shape[1])
    print(f"from {folder} step {meta['step']}")
    about = {
        "items_from": "SASRec started from a table" if run.flags.get("init_table") else "SASRec",
        "sasrec": str(folder),
        "sasrec_step": meta["step"],
        "sasrec_sha256": checkpoint.weights_sha256(folder / "best"),
        "sasrec_flags": run.flags,
    }
    return data, data.item_ids, trained, about


def vectors_of_titles(given: ItemVectors, domain):
    """A sentence encoder's vectors of the items' titles; the same four."""
    text_model, dim = given.text_model, given.dim
    data, csv_path = domain.read()

    import numpy as np
    import torch

    from datasets.item_table import check_size
    from datasets.items import Items
    from models.text import principal_parts, sentence_vectors
    from utils import processes

    items = Items.of(csv_path, data.item_ids, others=True)
    check_size(csv_path, items.ids, dim)
    known = np.isin(items.ids, data.item_ids)
    untitled = sum(not title for title in items.titles)
    cli.check(
        (untitled < len(items.ids), f"{csv_path}: no item has a title; docs/data.md says where"),
        (dim < data.n_items, f"--dim={dim}: the data has only {data.n_items} items"),
    )
    vectors = sentence_vectors(items.titles, text_model, processes.choose_device(given.device))
    width = vectors.shape[1]
    cli.check((dim <= width, f"--dim={dim}: {text_model} gives {width} numbers per title"))
    if untitled:
        print(f"{untitled:,} items without a title share one vector")
    about = {
        "items_from": "titles",
        "text_model": text_model,
        "not_in_data": int((~known).sum()),
        "ends_are_items": domain.ends_are_items,
    }
    return data, items.ids, principal_parts(vectors, torch.from_numpy(known), dim), about


@cli.command
def main(*, files: ExtractFiles, vectors: ItemVectors) -> dict:
    """Write an item table: row i is the vector of item id i, ids that occur nowhere have zeros."""
    from datasets.domain import Domain
    from utils.files import check_writable

    domain = Domain.of(files)
    path = Path(files.item_table or domain.folder / f"{vectors.source}_item.pkl")
    cli.check((path.suffix == ".pkl", f"--item_table={path}: must end in .pkl"))
    check_writable(path.parent, "--item_table")
    if vectors.source == "titles":
        cli.report_unused(files, "--source=titles reads no SASRec", "sasrec")
        made = vectors_of_titles(vectors, domain)
    else:
        made = vectors_of_sasrec(files, domain)
    data, item_ids, rows, about = made

    import torch  # imported late: bad flags fail at once

    from datasets.item_table import write_table

    n_rows = int(item_ids[-1]) + 1
    table = torch.zeros(n_rows, rows.shape[1])
    table[torch.from_numpy(item_ids)] = rows
    about |= {
        "domain": domain.name,
        "dim": table.shape[1],
        "rows": n_rows,
        "items": len(item_ids),
        "data_sha256": data.sha256,
    }
    write_table(path, table, about)
    print(f"wrote {path}: {n_rows:,} rows x {table.shape[1]}, {len(item_ids):,} of them items")
    return about


if __name__ == "__main__":
    cli.run(main)
