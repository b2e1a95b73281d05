"""How a run computes on CPU: with as many threads as it began, which sleep while they wait; with
which library's products.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import distill
from engine import cpu
from tests.conftest import SHORT


@pytest.fixture
def threads():
    """The number is put back."""
    before = torch.get_num_threads()
    yield before
    torch.set_num_threads(before)


@pytest.mark.parametrize("given", [{}, {"OMP_WAIT_POLICY": "active"}, {"GOMP_SPINCOUNT": "9"}])
def test_waiting_threads_sleep_unless_the_user_says_otherwise(given):
    code = "import os; from engine import cpu; cpu.let_threads_sleep()"
    code += "; print(os.environ.get('GOMP_SPINCOUNT'))"
    env = {n: v for n, v in os.environ.items() if n not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=env | given, capture_output=True, text=True, check=True)
    expected = given.get("GOMP_SPINCOUNT", "None" if given else "0")
    assert done.stdout.strip() == expected


def test_a_number_that_the_user_set_is_left_alone(threads, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    cpu.choose_threads(threads + 1)
    assert torch.get_num_threads() == threads


@pytest.mark.slow
def test_a_resumed_run_computes_with_the_threads_that_it_began_with(
    inside, threads, monkeypatch, capsys
):
    monkeypatch.delenv("OMP_NUM_THREADS")
    torch.set_num_threads(2)
    distill.main(**SHORT, output_dir="s")
    assert json.loads(Path("s/config.json").read_text())["threads"] == 2
    torch.set_num_threads(1)
    distill.main(eval_only=True, output_dir="s")
    assert torch.get_num_threads() == 2
    assert "2 of 1 threads: as this run began" in capsys.readouterr().out
    torch.set_num_threads(1)
    Path("s/results.json").unlink()
    distill.main(**SHORT, output_dir="s")
    assert torch.get_num_threads() == 2


@pytest.mark.slow
def test_resuming_with_another_number_is_said(inside, capsys):
    distill.main(**SHORT, output_dir="s")
    config = json.loads(Path("s/config.json").read_text())
    Path("s/config.json").write_text(json.dumps(config | {"threads": 64}))
    Path("s/results.json").unlink()
    capsys.readouterr()
    distill.main(**SHORT, output_dir="s")
    said = capsys.readouterr().out
    assert re.search(r"resuming with \d+ threads, not 64: not bit for bit", said)


@pytest.fixture
def highest():
    """torch's own choice of products; what was chosen before is put back."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(
    "amd, error, expected",
    [
        (True, 4e-7, "medium"),
        (True, 2e-3, "highest"),  # they would be of bfloat16
        (False, 4e-7, "highest"),
    ],
)
def test_onednn_takes_products_on_amd_alone_and_in_float32_alone(
    highest, monkeypatch, amd, error, expected
):
    monkeypatch.setattr(cpu, "_is_amd", lambda: amd)
    monkeypatch.setattr(cpu, "_product_error", lambda: error)
    cpu.choose_products()
    assert torch.get_float32_matmul_precision() == expected


def test_a_precision_that_the_user_set_is_left_alone(highest, monkeypatch):
    monkeypatch.setattr(cpu, "_is_amd", lambda: True)
    torch.set_float32_matmul_precision("high")
    cpu.choose_products()
    assert torch.get_float32_matmul_precision() == "high"


def test_the_products_chosen_here_are_of_float32(highest):
    cpu.choose_products()
    assert cpu._product_error() < cpu.LARGEST_PRODUCT_ERROR


def test_the_error_shows_bfloat16(monkeypatch):
    exact = torch.Tensor.__matmul__

    def halved(a, b):
        return exact(a, b) if a.dtype == torch.float64 else exact(a.bfloat16(), b.bfloat16())

    monkeypatch.setattr(torch.Tensor, "__matmul__", halved)
    assert cpu._product_error() > cpu.LARGEST_PRODUCT_ERROR


@pytest.mark.parametrize(
    "ratio, used, compiles, expected",
    [
        (35, True, True, "bf16 products are 35 times slower than float32 here; leave --bf16 out\n"),
        (35, False, True, ""),
        (0.5, True, True, ""),
        (0.5, False, True, ""),
        (
            0.125,
            False,
            True,
            "bf16 products are 8 times faster than float32 here: --bf16 true --compile true\n",
        ),
        (0.125, False, False, "bf16 products are 8 times faster than float32 here: --bf16 true\n"),
        (0.125, True, True, ""),
    ],
)
def test_what_bfloat16_costs_here_is_said(monkeypatch, capsys, ratio, used, compiles, expected):
    seconds = {"bfloat16": ratio, "float32": 1.0}
    monkeypatch.setattr(cpu, "_seconds_of_product", seconds.get)
    cpu.report_bfloat16(used, compiles)
    assert capsys.readouterr().out == expected
