import collections
import io
import os
import pickle

import numpy as np
import pytest
import torch

from datasets.item_table import read_table, write_table
from engine.errors import UsageError
from tests.conftest import script

IDS = np.array([1, 3, 4])


def table():
    t = torch.zeros(5, 2)
    t[IDS] = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    return t


def pickled(path, content):
    path.write_bytes(content if isinstance(content, bytes) else pickle.dumps(content))
    return path


def test_round_trip_and_plain_pickle_reads_it(tmp_path):
    path = tmp_path / "sasrec_item.pkl"
    write_table(path, IDS, table()[IDS], {"domain": "x"})
    assert torch.equal(read_table(path, IDS), table()[IDS])
    with open(path, "rb") as file:
        content = pickle.load(file)  # as the released code reads it
    assert torch.equal(content["item_embedding"], table())
    assert content["item_embedding"].dtype == torch.float32
    assert sorted(p.name for p in tmp_path.iterdir()) == ["sasrec_item.json", "sasrec_item.pkl"]


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("kind", ["tensor", "parameter", "array", "big", "half", "strided"])
def test_what_others_write_is_read(tmp_path, protocol, kind):
    value = {
        "tensor": table(),
        "parameter": torch.nn.Parameter(table()),
        "array": table().numpy(),
        "big": table().numpy().astype(">f4"),
        "half": table().half(),
        "strided": torch.cat([table(), table()], dim=1)[:, :2],
    }[kind]
    path = pickled(tmp_path / "t.pkl", pickle.dumps({"item_embedding": value}, protocol=protocol))
    assert torch.equal(read_table(path, IDS), table()[IDS])


@pytest.mark.parametrize("kind", ["tensor", "array", "npy", "torch.save", "state dict"])
def test_tables_as_others_have_them_are_read(tmp_path, kind):
    path = tmp_path / "t.pkl"
    if kind == "npy":
        np.save(path.with_suffix(".npy"), table().numpy())
        path = path.with_suffix(".npy")
    elif kind == "torch.save":
        torch.save({"item_embedding": table()}, path)
    else:
        content = {"tensor": table(), "array": table().numpy()}
        pickled(path, content.get(kind, {"item_embedding.weight": table()}))
    assert torch.equal(read_table(path, IDS), table()[IDS])


class Runs:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


class Nested:
    """torch's storage reducer is itself a pickle inside the pickle."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        buffer = io.BytesIO()
        torch.save(Runs(self.marker), buffer, _use_new_zipfile_serialization=False)
        return torch.storage._load_from_bytes, (buffer.getvalue(),)


@pytest.mark.parametrize("save", [pickle.dump, torch.save])
@pytest.mark.parametrize("payload", [Runs, Nested])
def test_a_file_that_would_run_code_is_refused_and_runs_nothing(tmp_path, payload, save):
    marker = tmp_path / "marker"
    with open(tmp_path / "t.pkl", "wb") as file:
        save({"item_embedding": table(), "x": payload(marker)}, file)
    with pytest.raises(UsageError, match="refused"):
        read_table(tmp_path / "t.pkl", IDS)
    assert not marker.exists()


def broken(value, row=3):
    t = table()
    t[row] = value
    return {"item_embedding": t}


HOLDS = {  # what the file holds under the key -> words of the answer
    "not a tensor": ([[1.0]], "found list"),
    "one dimension": (torch.ones(5), r"found torch.float32 of shape \(5,\)"),
    "three dimensions": (torch.ones(5, 2, 2), r"of shape \(5, 2, 2\)"),
    "numpy integers": (np.ones((5, 2), dtype=np.int32), "found int32 of shape"),
    "larger than float32": (table().double() * 1e300, "contain NaN or infinity"),
    "integers": (torch.ones(5, 2, dtype=torch.long), "found torch.int64"),
    "too few rows": (torch.ones(4, 2), "max id 4 but the item table has 4 rows"),
    "overflowed half": ((table() * 70000).half(), "contain NaN or infinity"),
    "zeros": (torch.zeros(5, 2), "3 of 3 occurring items have a row of zeros"),
    "objects": (np.array([[object()] * 4] * 5, dtype=object), "refused|found"),
    "texts": (np.array([["a"] * 4] * 5), "refused|found"),
    "long double": (np.ones((5, 4), dtype=np.longdouble), "refused|found"),
    "complex": (np.ones((5, 4), dtype=np.complex64), "refused|found"),
    "sparse": (torch.ones(5, 4).to_sparse(), "refused|found"),
}
CASES = {name: ({"item_embedding": value}, said) for name, (value, said) in HOLDS.items()}
CASES |= {
    "two entries": ({"a": table(), "b": table()}, "found 2 entries: a, b; write it as"),
    "not a dict": ([table()], "found list"),
    "nan": (broken(float("nan")), "rows 3 contain NaN"),
    "text": (b"hello", "refused, not a plain tensor"),
    "empty": (b"", "refused"),
    "cut short": (pickle.dumps({"item_embedding": table()})[:-30], "refused"),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_tables_are_refused_in_one_line(tmp_path, name):
    content, message = CASES[name]
    path = pickled(tmp_path / "t.pkl", content)
    with pytest.raises(UsageError, match=message) as caught:
        read_table(path, IDS)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["npy", "torch", "pickle"])
def test_every_row_of_a_table_is_read_and_checked(tmp_path, kind):
    """Items 1, 3, 4, 6 and 8 of a table of nine rows."""
    path, ids = tmp_path / "table", np.array([1, 3, 4, 6, 8])

    def write(table):
        if kind == "npy":
            with open(path, "wb") as file:
                np.save(file, table.numpy())
        elif kind == "torch":
            torch.save(table, path)
        else:
            write_table(path, np.arange(len(table)), table, {})

    table = torch.arange(1.0, 28).view(9, 3)
    write(table)
    found = read_table(path, ids)
    assert found.tolist() == [[3.0 * i + 1, 3.0 * i + 2, 3.0 * i + 3] for i in (1, 3, 4, 6, 8)]
    found[0] = -1.0  # the file is not touched
    assert torch.equal(read_table(path, ids)[1:], found[1:]) and (read_table(path, ids) > 0).all()
    write(table.index_fill(0, torch.tensor(6), torch.nan))
    with pytest.raises(UsageError, match="rows 6 contain NaN or infinity"):
        read_table(path, ids)


def test_nan_in_a_row_that_no_item_uses_is_no_matter(tmp_path):
    path = pickled(tmp_path / "t.pkl", broken(float("nan"), row=2))
    assert torch.equal(read_table(path, IDS), table()[IDS])


def test_the_same_table_gives_the_same_bytes_in_every_process(tmp_path):
    code = "import sys, numpy, torch; from datasets.item_table import write_table;"
    code += "keep = [torch.randn(100) for _ in range(int(sys.argv[1]))];"
    code += "write_table('t.pkl', numpy.arange(5), torch.arange(20.).reshape(5, 4), {})"
    found = set()
    for n in ("1", "77"):
        script("-c", code, n, cwd=tmp_path)
        found.add((tmp_path / "t.pkl").read_bytes())
    assert len(found) == 1


def test_a_file_cannot_lay_objects_over_its_own_bytes(tmp_path):
    """numpy.ndarray of objects over a buffer makes pointers of bytes, which end the process."""

    class Forged:
        def __reduce__(self):
            return collections.OrderedDict, (Pointers(),)

    class Pointers:
        def __reduce__(self):
            return np.ndarray, ((1,), np.dtype("O"), b"A" * 8)

    (tmp_path / "t.pkl").write_bytes(pickle.dumps({"item_embedding": Forged()}))
    with pytest.raises(UsageError, match="refused, not a plain tensor"):
        read_table(tmp_path / "t.pkl", np.arange(5))
