"""How a run computes on CPU: with how many threads, and with which library's products."""

import json
from pathlib import Path

import pytest
import torch

import distill
from engine import cpu
from tests.conftest import SHORT


@pytest.fixture
def four(monkeypatch):
    """Four threads by default, none set by the user; the number is put back."""
    before = torch.get_num_threads()
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(cpu, "_default_threads", lambda: 4)
    yield
    torch.set_num_threads(before)


A_QUIET_MACHINE = {4: [9, 9, 8], 2: [10, 10, 10], 1: [11, 11, 11]}
STUCK_NOW_AND_THEN = A_QUIET_MACHINE | {4: [9, 9, 1, 1]}
BUSY = {4: [1, 1, 1], 2: [2, 2, 9], 1: [11, 10, 10]}


@pytest.mark.parametrize(
    "rates, expected", [(A_QUIET_MACHINE, 4), (STUCK_NOW_AND_THEN, 2), (BUSY, 1)]
)
def test_the_number_is_halved_while_regions_wait(four, monkeypatch, capsys, rates, expected):
    monkeypatch.setattr(cpu, "_rates", lambda threads: rates[threads])
    cpu.choose_threads()
    assert torch.get_num_threads() == expected
    said = capsys.readouterr().out
    line = f"{expected} of 4 threads: other processes are at work here; OMP_NUM_THREADS sets it\n"
    assert said == ("" if expected == 4 else line)


def test_a_number_that_the_user_set_is_left_alone(four, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setattr(cpu, "_rates", lambda threads: pytest.fail("measured"))
    before = torch.get_num_threads()
    cpu.choose_threads(2)
    assert torch.get_num_threads() == before


def test_a_resumed_run_computes_with_the_threads_that_it_began_with(inside, four, monkeypatch):
    monkeypatch.setattr(cpu, "_rates", lambda threads: [1.0] * 3 if threads == 4 else [9.0] * 3)
    distill.main(**SHORT, output_dir="s")
    config = Path("s/config.json")
    assert json.loads(config.read_text())["threads"] == 2
    monkeypatch.setattr(cpu, "_rates", lambda threads: pytest.fail("measured"))
    torch.set_num_threads(1)
    distill.main(eval_only=True, output_dir="s")
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)
    Path("s/results.json").unlink()
    distill.main(**SHORT, output_dir="s")
    assert torch.get_num_threads() == 2
    cpu.choose_threads(64)  # of a larger machine
    assert torch.get_num_threads() == 4


@pytest.fixture
def highest():
    """torch's own choice of products; what was chosen before is put back."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


PRODUCTS = [(True, 4e-7, "medium"), (True, 2e-3, "highest"), (False, 4e-7, "highest")]


@pytest.mark.parametrize("amd, error, expected", PRODUCTS)  # the second would be of bfloat16
def test_onednn_takes_float32_products_on_amd_alone(highest, monkeypatch, amd, error, expected):
    monkeypatch.setattr(cpu, "_about", lambda: "vendor_id: AuthenticAMD" * amd)
    monkeypatch.setattr(cpu, "_product_error", lambda: error)
    cpu.choose_products()
    assert torch.get_float32_matmul_precision() == expected


def test_the_error_shows_bfloat16(monkeypatch):
    exact = torch.Tensor.__matmul__

    def halved(a, b):
        return exact(a, b) if a.dtype == torch.float64 else exact(a.bfloat16(), b.bfloat16())

    monkeypatch.setattr(torch.Tensor, "__matmul__", halved)
    assert cpu._product_error() > cpu.LARGEST_PRODUCT_ERROR


SLOWER = "bf16 products are 35 times slower than float32 here; leave --bf16 out\n"
FASTER = "bf16 products are 8 times faster than float32 here: --bf16 true"
TOLD = [(35, True, True, SLOWER), (0.5, True, True, ""), (0.125, True, True, "")]
TOLD += [(0.125, False, True, f"{FASTER} --compile true\n"), (0.125, False, False, f"{FASTER}\n")]


@pytest.mark.parametrize("ratio, used, compiles, expected", TOLD)
def test_what_bfloat16_costs_here_is_said(monkeypatch, capsys, ratio, used, compiles, expected):
    seconds = {"bfloat16": ratio, "float32": 1.0}
    monkeypatch.setattr(cpu, "_seconds_of_product", seconds.get)
    cpu.report_bfloat16(used, compiles)
    assert capsys.readouterr().out == expected
