"""The plain form computes the same as ours, and tables come out."""

import copy
import json

import pytest
import torch

from benchmarks import efficiency, first_gpu, measure, plain, throughput
from datasets.demo import write_demo
from datasets.interactions import write_csv
from distill import StudentLoss, loss_parts
from engine.errors import UsageError
from tests.conftest import ROOT, histories, refused, small_config, small_model


def test_the_plain_loss_is_distills_default_loss_in_parity():
    teacher, student = small_model(layers=4, seed=9), small_model(layers=2)
    batch, target = histories([3, 8, 1, 5]), torch.tensor([1, 2, 3, 4])
    with torch.no_grad():
        wanted = teacher(batch)
    given = student(batch), wanted, None, student.item_table, target
    parts = loss_parts(*given, StudentLoss())
    given = plain.plain_loss(student(batch), wanted, student.item_table, target)
    # the plain form rounds to float32
    torch.testing.assert_close(given.double(), parts["total"], atol=1e-5, rtol=1e-6)
    alone = student(batch)._replace(exits=torch.empty(4, 0, 6))
    given = plain.plain_loss(alone, None, student.item_table, target).double()
    torch.testing.assert_close(given, parts["ce"], atol=1e-5, rtol=1e-6)


def test_twins_of_a_half_precision_base_agree():
    """As on CUDA: the base in bfloat16, LoRA and adapters in float32, under autocast."""
    torch.manual_seed(0)
    shape = measure.Shape(small_config(), list(range(20)), [50, 51, 52], torch.randn(300, 8), 12)
    ours, theirs = shape.twins(4, "lora", bf16=True)
    batch = histories([1, 12, 5, 7], n_items=300, slots=12)
    for model in (ours, theirs):
        named = model.named_parameters()
        base = [p for name, p in named if "layers" in name and "lora" not in name]
        dtypes = {p.dtype for p in base}
        assert dtypes == {torch.bfloat16}
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            given, wanted = ours(batch).user.float(), theirs(batch).user.float()
        exact = copy.deepcopy(ours).float()(batch).user
    errors = [float((rounded - exact).norm() / exact.norm()) for rounded in (given, wanted)]
    # ours rounds no worse than the plain form
    assert 0 < errors[0] < 1.5 * errors[1] < 0.15, errors
    losses = []
    for model in (ours, theirs):  # and learn alike

        def loss(h, model=model):
            return plain.plain_loss(model(h), None, model.item_table, torch.arange(4))

        measure.training_step(model, loss, bf16=True)(batch)
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            losses.append(float(loss(batch)))
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


def test_a_row_is_measured_in_a_process_of_its_own(tmp_path):
    rows = [(f"u{u}", [*range(u * 200, u * 200 + 200)], [""] * 200) for u in range(200)]
    write_csv(tmp_path / "large.csv", rows)
    setting = efficiency.Setting(str(tmp_path / "large.csv"), "tiny", 8, 16, "cpu")
    found = efficiency.measured("SASRec, ours", setting, 8, 0)
    n = found["parameters"]
    assert min(found["seconds"]) > 0 and found["trained_parameters"] == n > 40_000 * 128
    weights = 4 * n  # bytes; with gradients and AdamW's two moments four times that
    # and the gradients of the table, which are summed from its two uses
    assert 4 * weights < found["peak_bytes"] < 10 * weights
    assert efficiency.measured("of 0 layers, ours", setting, 8, 0) is None  # it dies


def test_wrong_requests_are_refused_before_any_row_runs(tmp_path):
    with refused("--rows=nope: expected all, or beginnings of E4SRec, 32 layers, plain"):
        efficiency.main(rows=["nope", "SASRec"])
    with pytest.raises(UsageError, match="--rows=nope: expected all, or some of steps"):
        throughput.main(rows=["nope"])
    (tmp_path / "file").write_text("")
    for main in (efficiency.main, throughput.main):
        with pytest.raises(UsageError, match="is a file, not a folder"):
            main(output_dir=str(tmp_path / "file"))


@pytest.mark.slow
def test_the_throughput_table_comes_out(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_demo("data/demo.csv", n_users=120, n_items=160)
    monkeypatch.setattr("models.attention._compiled", lambda step: step)  # takes a minute
    shape = {"teacher_layers": 2, "student_layers": 1, "distill_block": 1}
    result = throughput.main(repeats=1, batch_size=16, **shape)
    written = json.loads((tmp_path / "output/benchmarks/throughput.json").read_text())
    assert written == json.loads(json.dumps(result))
    names = [row["row"] for row in result["rows"]]
    assert len(names) == 3 + 3 + 3 + 1 + 2 == len(set(names))
    for row in result["rows"]:
        assert row["ours"] > 0 and row["plain"] > 0 and row["ratio"] > 0
    page = (tmp_path / "output/benchmarks/throughput.md").read_text().splitlines()
    assert len(page) == 2 + len(names) and len({line.count("|") for line in page}) == 1


@pytest.mark.slow
def test_the_efficiency_table_comes_out(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_demo("data/demo.csv", n_users=120, n_items=160)
    fits = []  # a step of the plain form "has no memory" for more than two users

    def measured(name, setting, micro, number):
        fits.append(name.endswith("ours") or micro <= 2)
        return efficiency._measure(name, setting, micro, number) if fits[-1] else None

    monkeypatch.setattr(efficiency, "measured", measured)
    rows = ["E4SRec, 8", "E4SRec, 4", "SLMRec", "SASRec"]
    result = efficiency.main(shape="tiny", repeats=1, batch_size=8, eval_batch_size=16, rows=rows)
    assert len(result["rows"]) == 6 and result["samples"] == 120
    rows = result["rows"]
    plain_row, ours = rows["E4SRec, 4 layers, plain"], rows["SLMRec 4 <- 8, ours"]
    assert plain_row["parameters"] == ours["parameters"] and fits.count(False) == 4
    assert (plain_row["micro_batch_size"], ours["micro_batch_size"]) == (2, 8)
    eight, four = rows["E4SRec, 8 layers, ours"], rows["E4SRec, 4 layers, ours"]
    assert eight["trained_parameters"] == 2 * four["trained_parameters"]
    times = {name: [[4.0, 2.0], [6.0, 3.0]] for name in efficiency.ROWS}
    times["SLMRec 4 <- 8, ours"] = [[2.0, 1.0], [2.0, 1.0]]
    assert efficiency.ratios(times)["plain / ours, all"] == [2.5, 2.5]  # medians of 2 and 3
    page = (tmp_path / "output/benchmarks/efficiency.md").read_text()
    assert "| E4SRec, 4 layers, plain |" in page and "| 0.90 / 0.083 / 0.003 / 0.944 |" in page


@pytest.mark.slow
def test_the_first_run_on_a_gpu_runs_dry(tmp_path, monkeypatch):
    """Every part as a command of its own; the page says that its figures mean nothing."""
    monkeypatch.chdir(ROOT)
    page = first_gpu.main(dry=True, output=str(tmp_path / "gpu.md"))
    text = page.read_text()
    assert text.startswith("# First run on a GPU (dry run on CPU: figures mean nothing)")
    assert text.count("\n## ") == 8 and "FAILED" not in text
    assert "student train step" in text and "SASRec, ours" in text and "aten::mm" in text
