"""Item vectors from titles, items without a user, and the sum of two models."""

import hashlib
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

import extract_emb
import finetune
import train_sr_trad
from datasets.interactions import read_csv
from datasets.item_table import ids_with_vectors, read_table
from datasets.sequences import some_histories
from engine import checkpoint
from engine.errors import UsageError
from experiments import titles
from experiments.titles import principal_parts
from serving import recommend, served
from serving.recommender import Recommender, summed
from serving.served import ServedFiles
from tests.conftest import ROOT, SHORT
from utils.evaluation import score_spreads

NEW = 170  # an item of items.csv that no sequence has; the demo's ids end at 160


class Encoder:
    """Stands for a sentence encoder: a vector of each title's own, of length one."""

    def __init__(self, name, device):
        if name == "broken":
            raise OSError("no such model\nanywhere")

    def encode(self, titles, normalize_embeddings, convert_to_tensor, show_progress_bar):
        rows = []
        for title in titles:
            seed = int.from_bytes(hashlib.sha256(title.encode()).digest()[:4])
            rows.append(torch.randn(24, generator=torch.Generator().manual_seed(seed)))
        return torch.nn.functional.normalize(torch.stack(rows), dim=1)


@pytest.fixture
def encoder(monkeypatch):
    package = types.ModuleType("sentence_transformers")
    package.SentenceTransformer = Encoder
    monkeypatch.setitem(sys.modules, "sentence_transformers", package)


def test_principal_parts_are_white_and_later_items_change_nothing():
    torch.manual_seed(0)
    vectors = torch.randn(60, 5) @ torch.diag(torch.tensor([9.0, 4.0, 2.0, 1.0, 0.1])) + 3.0
    known = torch.arange(60) < 50
    parts = principal_parts(vectors, known, 3)
    inside = parts[known].double()
    spread = inside.T @ inside / 50
    assert inside.mean(0).abs().max() < 1e-6
    torch.testing.assert_close(spread, torch.eye(3).double() * spread[0, 0], atol=1e-6, rtol=1e-6)
    assert float(parts[known].norm(dim=1).mean()) == pytest.approx(1.0)
    # the first part is the direction of the largest spread
    first = np.linalg.eigh(np.cov(vectors[known].numpy().T))[1][:, -1]
    along = (vectors - vectors[known].mean(0)) @ torch.from_numpy(first).float()
    assert abs(float(np.corrcoef(along[known], inside[:, 0])[0, 1])) > 0.9999
    assert principal_parts(vectors[known], known[known], 3).equal(parts[known])
    same = torch.ones(9, 5)
    same[0] = 2.0
    with pytest.raises(UsageError, match="--dim=2: the titles span only 1 directions"):
        principal_parts(same, torch.ones(9, dtype=torch.bool), 2)


def write_listing(*more):
    names = [f"{item},,warm thing {item}" for item in range(1, 161)]
    Path("data/demo.items.csv").write_text("\n".join(["item_id,asin,title", *names, *more]) + "\n")


def test_an_item_without_a_user_gets_a_vector_and_can_be_recommended(inside, encoder, capsys):
    write_listing(f"{NEW},B00,quite new")
    titles.main(text_model="any", dim=16)
    table = Path("output/demo/titles_item.pkl")
    assert f"wrote {table}: 171 rows x 16, 161 of them items" in capsys.readouterr().out
    ids = np.append(np.arange(1, 161), NEW)
    assert ids_with_vectors(table).tolist() == ids.tolist()
    rows = read_table(table, ids)
    write_listing()
    titles.main(text_model="any", dim=16, item_table="without.pkl")
    assert read_table("without.pkl", ids[:-1]).equal(rows[:-1])
    write_listing(f"{NEW},B00,quite new")
    finetune.main(**SHORT, item_table=str(table), llama_decoder_nums=2, output_dir="titles")
    # by hand: the user's vector times the new item's
    options = {"history": ["3", "8"], "by": "id", "model": "titles", "exclude": "none"}
    found = {row["item_id"]: row for row in recommend.main(**options, k=161, unseen=True)}
    assert len(found) == 161 and found[NEW]["title"] == "quite new"
    short = {"llama_decoder_nums": 1, "max_seq_length": 2, "output_dir": "short"}
    finetune.main(**SHORT, item_table=str(table), **short)
    names = ("titles", "short", "titles,short")
    titled, *_ = every = [served.read_all(ServedFiles(model=name)) for name in names]
    *each, both = (recommend.open_model(runs, "cpu", True)[0] for runs in every)
    histories = some_histories(read_csv("data/demo.csv"), each)
    spreads = score_spreads(each, torch.where(histories == 160, 161, histories))  # the padding
    scaled = [model.item_table / spread for model, spread in zip(each, spreads)]
    torch.testing.assert_close(both.item_table, torch.cat(scaled, dim=1))
    recommender, _ = recommend.open_model(titled, "cpu")
    history = torch.full((1, recommender.max_seq_length), 160)
    history[0, -2:] = torch.tensor([2, 7])
    score = float(recommender.encode(history)[0] @ rows[-1])
    assert found[NEW]["score"] == pytest.approx(score, abs=1e-5)
    before = recommend.main(**options, k=200)
    assert NEW not in {row["item_id"] for row in before} and len(before) == 160
    for row in before:
        assert found[row["item_id"]]["score"] == pytest.approx(row["score"], abs=1e-5)
    recommend.main(**options | {"history": [str(NEW)]}, unseen=True)  # and be in a history
    with pytest.raises(UsageError, match="--unseen: no vectors for items that the data lacks"):
        recommend.main(history=["3"], by="id", unseen=True)


def test_what_titles_cannot_give_is_refused(inside, encoder):
    for flags, said in (
        ({"text_model": "broken"}, "--text_model=broken: cannot be read .no such model anywhere"),
        ({"dim": 40}, "--dim=40: any gives 24 numbers per title"),
        ({"dim": 200}, "--dim=200: the data has only 160 items; give a smaller one"),
    ):
        with pytest.raises(UsageError, match=said):
            titles.main(**{"text_model": "any"} | flags)
    assert not Path("output/demo/titles_item.pkl").exists()


def test_without_titles_or_the_package_nothing_is_written(inside, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(UsageError, match="needs sentence-transformers; `make minilm` in"):
        titles.main()
    Path("data/bare.csv").write_text('reviewerID,asin\na,"[1, 2, 3, 4]"\nb,"[2, 3, 4, 1]"\n')
    with pytest.raises(UsageError, match="bare.csv: no item has a title"):
        titles.main(domain_type="bare", dim=2)


def test_sasrec_starts_from_a_table(inside):
    table = "output/demo/sasrec_item.pkl"
    still = SHORT | {"learning_rate": 1e-12}  # leaves the start visible in the checkpoint
    started = train_sr_trad.main(**still, init_table=table, output_dir="a")
    items = checkpoint.load("a/best")[0]["item_embedding.weight"][:-1]
    cosine = torch.nn.functional.cosine_similarity(items, read_table(table, np.arange(1, 161)))
    torch.testing.assert_close(cosine, torch.ones(160))
    length = 0.02 * items.shape[1] ** 0.5  # of so many numbers of standard deviation .02
    assert float(items.norm(dim=1).mean()) == pytest.approx(length, rel=1e-4)
    with pytest.raises(UsageError, match="--init_table has vectors of .* numbers, --emb_dim is 3"):
        train_sr_trad.main(**SHORT, init_table=table, emb_dim=3, hid_dim=3, output_dir="b")
    assert train_sr_trad.main(**still, init_table=table, output_dir="a") == started
    assert train_sr_trad.main(eval_only=True, output_dir="a")["test"] == started["test"]
    for runs, kind in (("a", "SASRec started from a table"), ("output/demo/sasrec", "SASRec")):
        assert extract_emb.main(sasrec=runs, item_table="t.pkl")["items_from"] == kind
    about = extract_emb.main(sasrec="output/demo/sasrec,a,a", item_table="t.pkl")
    assert about["items_from"] == "3 SASRecs, 2 started from a table"
    with pytest.raises(UsageError, match="from something else: init_table_sha256 is"):
        train_sr_trad.main(**still, output_dir="a")
    with pytest.raises(UsageError, match="--init_table=none.pkl: file not found"):
        train_sr_trad.main(init_table="none.pkl")
    with pytest.raises(UsageError, match="--init_from and --init_table both say"):
        train_sr_trad.main(init_table=table, init_from="a", output_dir="c")


def test_the_sum_of_two_models_by_hand():
    def model(table, slots):
        columns = torch.tensor(table)

        def encode(history):  # counts what it reads
            return torch.stack([(history == 0).sum(1), (history == 1).sum(1)], dim=1).float()

        return Recommender(encode, columns, torch.tensor([1.0, 2.0, 3.0]), slots)

    one = model([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]], 1)
    two = model([[0.0, 2.0], [3.0, 0.0], [0.0, 0.0]], 3)
    both = summed([one, two], [0.5, 2.0])
    # history 0, 1: the first reads item 1 alone and scores 0, 1, .5; the second both: 2, 3, 0
    items, scores = both.recommend([[0, 1]], 3, exclude="none")
    assert items.tolist() == [[1, 0, 2]] and scores.tolist() == [[3.5, 1.0, 1.0]]
    assert both.max_seq_length == 3
    # items (2, 0, 0, 1), (0, 2, 1.5, 0), (1, 1, 0, 0) less their mean (1, 1, .5, 1/3)
    expected = -(2 + 1 / 2 + 2 / 9) / ((2 + 1 / 4 + 4 / 9) * (3 + 1 / 9)) ** 0.5
    assert float(both.similar(0, 2)[1].min()) == pytest.approx(expected)


def test_titles_of_a_real_encoder_tell_things_apart(inside):
    pytest.importorskip("sentence_transformers")
    folder = ROOT / "output/base/minilm"
    if not (folder / "config.json").is_file():
        pytest.skip("no output/base/minilm: make minilm brings it")
    from experiments.titles import sentence_vectors

    names = ["red nail polish", "nail lacquer, red", "controller for PlayStation 4"]
    one, two, three = sentence_vectors(names, str(folder), torch.device("cpu"))
    assert float(one @ two) > 0.6 > 0.2 > float(one @ three)
    titles.main(text_model=str(folder), dim=16)
