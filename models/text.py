"""Item vectors from titles: a sentence encoder's, cut to the width of an item table."""

import torch
from torch import Tensor

from utils.errors import UsageError

PACKAGE = "sentence-transformers"
SMALLEST = 1e-6  # spread of a direction that counts, relative to the largest
LENGTH = 1.0  # mean length of an item's vector, near that of SASRec's items after training


def sentence_vectors(titles: list[str], text_model: str, device: torch.device) -> Tensor:
    """Unit-length vectors of the titles by a sentence encoder, float32 [n, W]. Shows a bar.

    Args:
        text_model: a folder or a Hugging Face id that the package sentence-transformers reads.
    Raises:
        UsageError: the package is missing, or it cannot read the model.
    """
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        raise UsageError(f"--source=titles needs {PACKAGE}; pip install {PACKAGE}") from None
    try:
        encoder = SentenceTransformer(text_model, device=str(device))
    except Exception as error:  # the package raises what it meets
        reason = " ".join(str(error).split())[:160]
        raise UsageError(f"--text_model={text_model}: cannot be read ({reason})") from None
    options = {"normalize_embeddings": True, "convert_to_tensor": True, "show_progress_bar": True}
    return encoder.encode(titles, **options).float().cpu()


def principal_parts(vectors: Tensor, known: Tensor, dim: int) -> Tensor:
    """The vectors along their `dim` principal directions, each of the same spread (whitened).

    Args:
        vectors: [n, W].
        known: bool [n], the items that directions, centre and spread are taken from: others may
            come later and change nothing.
        dim: at most W, and below the number of known items.
    Raises:
        UsageError: the known vectors span fewer directions.
    """
    of_known = vectors[known].double()
    centre = of_known.mean(0)
    _, spread, directions = torch.linalg.svd(of_known - centre, full_matrices=False)
    spanned = int((spread > spread[0] * SMALLEST).sum())
    if dim > spanned:
        raise UsageError(f"--dim={dim}: the titles span only {spanned} directions")
    parts = (vectors.double() - centre) @ (directions[:dim] / spread[:dim, None]).T
    return (parts * LENGTH / parts[known].norm(dim=1).mean()).float()
