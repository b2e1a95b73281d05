"""What steps 3 and 4 read before any model: the domain's sequences and its item table, checked against each other."""

import hashlib
from pathlib import Path
from typing import NamedTuple

from datasets.demo import ensure_demo
from datasets.interactions import Interactions, canonical_domain, find_csv, read_csv
from utils.cli import UsageError
from utils.runlog import read_json


class Inputs(NamedTuple):
    """domain's name, its sequences, the item table's file and that file's sha256."""

    domain: str
    data: Interactions
    table_path: Path
    table_sha256: str

    @property
    def hashes(self) -> dict[str, str]:
        """What a run was made from, for its config.json."""
        return {"data_sha256": self.data.sha256, "table_sha256": self.table_sha256}

    def table(self):
        """The item table's rows in catalogue order, float32 [N, D]."""
        from utils.embeddings import read_table

        return read_table(self.table_path, self.data.item_ids)


def read_inputs(domain_type: str, data_path: str | None, item_table: str | None) -> Inputs:
    """Find and check the CSV and the item table; imports no torch.

    Raises:
        UsageError: a file is missing or wrong, or the table was extracted from another CSV.
    """
    domain = canonical_domain(domain_type)
    ensure_demo(domain, data_path)
    csv_path = find_csv(domain, data_path)
    table_path = Path(item_table or f"output/{domain}/sasrec_item.pkl")
    if not table_path.is_file():
        raise UsageError(f"item table not found: {table_path}; extract_emb.py writes it (or name one with --item_table)")
    data = read_csv(csv_path)
    table_sha256 = hashlib.sha256(table_path.read_bytes()).hexdigest()
    notes = table_path.with_suffix(".json")
    if notes.is_file():
        about = read_json(notes, "item table notes")
        made_from = about.get("data_sha256")
        if made_from != data.sha256:
            raise UsageError(
                f"{table_path} was extracted from a CSV with sha256 {str(made_from)[:12]}..., {csv_path} has {data.sha256[:12]}...; run extract_emb.py again"
            )
        if about.get("table_sha256", table_sha256) != table_sha256:
            raise UsageError(
                f"{table_path} is not the table that {notes} describes; run extract_emb.py again, or remove the .json if the table is your own"
            )
    return Inputs(domain, data, table_path, table_sha256)
