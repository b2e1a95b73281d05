"""An exported folder: plain transformers and ONNX give the model's scores, or nothing is left."""

import csv
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModel, LlamaConfig

import distill
import finetune
import train_sr_trad
from engine.errors import RunError, UsageError
from serving import export, exported, recommend
from tests.conftest import ROOT, SHORT, hashes

EXPORTED = {"README.md", "items.csv", "recommender.safetensors", "recommender.json"}
EXPORTED |= {"recommender.onnx"}


def assert_same(folder, card, expected):
    """The card's code gives the list that the run gave: items 12 and 99 are lines 11 and 98."""
    scores = exported.card_scores((ROOT / "serving" / card).read_text(), folder)([11, 98])
    scores[[11, 98]] = -torch.inf
    names = list(csv.DictReader(open(folder / "items.csv", encoding="utf-8")))
    for row, line, score in zip(expected, *(x.tolist() for x in scores.topk(5)[::-1]), strict=True):
        assert (str(row["item_id"]), row["title"]) == (names[line]["item_id"], names[line]["title"])
        assert row["score"] == pytest.approx(score, abs=1e-5)


@pytest.mark.parametrize("strategy", ["full", "lora"])
def test_a_folder_works_alone(inside, strategy, tmp_path, monkeypatch):
    finetune.main(**SHORT, train_strategy=strategy, learning_rate=0.01, output_dir="t")
    short = SHORT | {"learning_rate": 0.01, "layer_selection": "1,3,5,7"}
    distill.main(**short, teacher="t", train_strategy=strategy, output_dir="s")
    expected = recommend.main(model="s", history=["12", "99"], k=5)
    export.main(model="s", output_dir="out/shop", onnx=True)
    names = {path.name for path in Path("out/shop").iterdir()}
    assert names == EXPORTED | {"config.json", "model.safetensors"}
    shutil.move("out/shop", tmp_path / "shop")
    monkeypatch.chdir(tmp_path)
    assert_same(Path("shop"), "scores.py", expected)
    llama = AutoModel.from_pretrained("shop")
    assert type(llama).__name__ == "LlamaModel" and len(llama.layers) == 4
    assert not any("lora" in name for name, _ in llama.named_parameters())
    card = Path("shop/README.md").read_text()
    assert "layers 1, 3, 5, 7" in card and f"trained | {strategy}" in card
    code = re.search(r"```python\n(.*?)```", card, re.S)[1]
    assert len(code.splitlines()) < 40
    ran = subprocess.run([sys.executable, "-c", code], cwd="shop", capture_output=True, text=True)
    assert len(json.loads(ran.stdout)) == 10, ran.stderr


def test_a_mismatch_is_an_error_and_leaves_nothing(inside, monkeypatch):
    monkeypatch.setattr(exported, "card_scores", lambda *_: lambda history: torch.ones(160))
    with pytest.raises(RunError, match="the card's code gives other scores"):
        export.main(output_dir="out")
    assert not Path("out").exists() and not list(Path().glob(".tmp-*"))


def test_scores_that_nearly_agree_may_change_places():
    expected = torch.tensor([[3.0, 2.0, 2.0 + 1e-6, 1.0]])
    exported.verify(expected, torch.tensor([[3.0, 2.0 + 1e-6, 2.0, 1.0]]), "x")
    with pytest.raises(RunError, match="x gives other scores: they differ by 0.01, allowed 3e-05"):
        exported.verify(expected, expected + torch.tensor([0, 0, 0.01, 0]), "x")
    with pytest.raises(RunError, match="other scores"):
        exported.verify(expected, expected * torch.nan, "x")


def test_requests_that_cannot_be(inside, monkeypatch):
    Path("mine").mkdir()
    Path("mine/letter.txt").write_text("x")
    for flags, message in (
        ({"output_dir": "mine"}, "--output_dir=mine: already exists; not an export"),
        ({"output_dir": "mine", "overwrite": True}, "not an export, choose another"),
        ({"output_dir": "o", "model": "none"}, "--model=none: no run in none"),
    ):
        with pytest.raises(UsageError, match=message):
            export.main(**flags)
    export.main(output_dir="o", verify_users=3)
    with pytest.raises(UsageError, match="--output_dir=o: already exists; --overwrite replaces it"):
        export.main(output_dir="o")
    export.main(output_dir="o", model="teacher", overwrite=True, verify_users=3)
    card = Path("o/README.md").read_text()
    assert "8 LLaMA layers (teacher)" in card and "| none: it is random |" in card
    recorded = Path("output/demo/teacher/results.json")
    results = json.loads(recorded.read_text())
    fewest = results["candidates"]["fewest"]
    assert 100 < fewest < 160
    assert f"| the target among at least {fewest} items that the user had not met |" in card
    del results["candidates"]  # as in a run from before it was recorded
    recorded.write_text(json.dumps(results))
    export.main(output_dir="o", model="teacher", overwrite=True, verify_users=3)
    card = Path("o/README.md").read_text()
    assert "| the target among 999 items that the user had not met |" in card
    monkeypatch.setattr(export, "find_spec", lambda name: None if name == "onnxscript" else name)
    with pytest.raises(UsageError, match="--onnx needs onnxscript; pip install onnxscript"):
        export.main(output_dir="p", onnx=True)
    with pytest.raises(UsageError, match="--model=o: an export, not a run"):
        export.main(model="o", output_dir="p")


def test_the_old_export_stands_until_the_new_one_does(inside, monkeypatch):
    """A link, the folder that the command runs in, a mount point and a full disk."""
    export.main(output_dir="o", verify_users=3)
    Path("link").symlink_to("o")
    export.main(output_dir="link", overwrite=True, verify_users=3)
    assert Path("link").is_symlink() and Path("o/config.json").is_file()
    before = hashes(Path("o"))
    with pytest.raises(UsageError, match="--output_dir=/proc: is a mount point; name a folder"):
        export.main(output_dir="/proc", overwrite=True)
    with monkeypatch.context() as patch:
        patch.chdir("o")
        with pytest.raises(UsageError, match="--output_dir=.: the command runs in it; name a fol"):
            export.main(output_dir=".", overwrite=True)
    for error in (OSError(28, "No space left on device"), SafetensorError("No space left")):
        with monkeypatch.context() as patch:
            patch.setattr(exported, "save_file", lambda *_, **__: (_ for _ in ()).throw(error))
            with pytest.raises(RunError, match="--output_dir=o: .*No space left.*; nothing was"):
                export.main(output_dir="o", overwrite=True, verify_users=3)
    rename = Path.rename

    def fails(self, target):
        if self.name.startswith(".tmp-"):
            raise OSError(16, "Device or resource busy")
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", fails)
        with pytest.raises(RunError, match="Device or resource busy; nothing was written"):
            export.main(output_dir="o", overwrite=True, verify_users=3)
    assert hashes(Path("o")) == before
    assert not [path for path in Path().iterdir() if path.name.startswith((".tmp-", ".old-"))]


def test_config_is_spelled_as_transformers_4_reads_it(tmp_path):
    """4.57 reads `rope_theta` and `rope_scaling`, and knows no `rope_parameters`."""
    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    scaled = {name: value for name, value in rope.items() if name != "rope_theta"}
    plain = {"rope_type": "default", "rope_theta": 5e5}
    for given, scaling in ((rope, scaled), (plain, None)):
        LlamaConfig(rope_parameters=given).save_pretrained(tmp_path)
        exported.spell_for_older(tmp_path / "config.json")
        config = json.loads((tmp_path / "config.json").read_text())
        assert config["rope_theta"] == 5e5 and config.get("rope_scaling") == scaling
        assert config["rope_parameters"] == given
        assert AutoConfig.from_pretrained(tmp_path).rope_parameters == given


def test_the_card_compares_and_says_how_to_feed_the_graph(inside):
    export.main(output_dir="o", onnx=True, verify_users=3)
    card = Path("o/README.md").read_text()
    sasrec = json.loads(Path("output/demo/sasrec/results.json").read_text())
    for name, metrics in (("SASRec", sasrec["test"]), ("popularity", sasrec["popularity"]["test"])):
        assert f"| the whole catalogue | {name} | {metrics['full_all']['HR@1']:.4f} |" in card
    assert "seed 42, in float32; these files are float32" in card and "torch 2." in card
    code = re.findall(r"```python\n(.*?)```", card, re.S)[1] + "print(found[0, :2].tolist())\n"
    ran = subprocess.run([sys.executable, "-c", code], cwd="o", capture_output=True, text=True)
    expected = exported.card_scores((ROOT / "serving/scores.py").read_text(), Path("o"))([0, 1, 2])
    assert json.loads(ran.stdout) == pytest.approx(expected[:2].tolist(), abs=1e-5), ran.stderr
    path = Path("output/demo/student/results.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"weights_sha256": "another best"}))
    export.main(output_dir="q", model="student", verify_users=3)
    assert "| the whole catalogue |" not in Path("q/README.md").read_text()
    distill.main(**SHORT, seed=8, num_candidates=50, output_dir="other")
    export.main(output_dir="p", model="other", verify_users=3)
    assert "| SASRec |" not in Path("p/README.md").read_text()


SHAPES = [("query", 32, 0.0), ("pre", 128, 0.0), ("post", 16, 0.0), (None, 64, 0.7)]


@pytest.mark.parametrize("norm, hid_dim, alpha", SHAPES)
def test_sasrec_is_exported_with_code_of_its_own(inside, norm, hid_dim, alpha):
    shape = {"hid_dim": hid_dim, "emb_dim": 128, "num_heads": 2, "max_seq_length": 9}
    shape |= {"norm": norm} if norm else {"alpha": alpha}
    train_sr_trad.main(**SHORT | shape, learning_rate=0.01, output_dir="s")
    expected = recommend.main(model="s", history=["12", "99"], k=5)
    export.main(model="s", output_dir="o", onnx=True, verify_users=120)
    names = {path.name for path in Path("o").iterdir()}
    assert names == EXPORTED
    assert_same(Path("o"), "scores_sasrec.py", expected)
    card = Path("o/README.md").read_text()
    assert (
        f"recommender: {'BSARec' if alpha else 'SASRec'}" in card
        and f"2 blocks of width {hid_dim}" in card
    )
    code = re.search(r"```python\n(.*?)```", card, re.S)[1]
    ran = subprocess.run([sys.executable, "-c", code], cwd="o", capture_output=True, text=True)
    assert len(json.loads(ran.stdout)) == 10, ran.stderr
