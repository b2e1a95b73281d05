"""Two processes (gloo) are one run: the same losses, the same ranks, one writer, no hang."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import ROOT, hashes, script, trained_lines

pytestmark = pytest.mark.slow
RUN = ["--batch_size=32", "--eval_batch_size=16", "--max_steps=50", "--log_steps=1"]
RUN += ["--warmup_steps=5", "--eval_steps=25"]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone"]


def start(processes, name, *flags, status=0):
    """One process as usual, several under torchrun, whose own status is 1."""
    command = [name, *flags]
    if processes > 1:
        command = [*TORCHRUN, f"--nproc_per_node={processes}", str(ROOT / name), *flags]
        status = min(status, 1)
    options = {"timeout": 240, "OMP_NUM_THREADS": "1"}
    return script(*command, cwd=Path.cwd(), status=status, **options)


def losses(folder):
    return [line["total"] for line in trained_lines(folder)]


def ranks(folder):
    with np.load(f"{folder}/ranks.npz", allow_pickle=False) as found:
        return {name: found[name].tolist() for name in found}


@pytest.mark.parametrize("strategy", ["lora", "full"])
def test_twenty_steps_in_double_precision(inside, strategy):
    """One process, two, and two that divide the model."""
    for folder, processes, shard in (("n1", 1, ""), ("n2", 2, ""), ("shard", 2, "shard")):
        start(processes, "tests/faults/two.py", "float64", folder, strategy, shard)
    assert losses("n1") == pytest.approx(losses("n2"), rel=1e-9) and len(losses("n1")) == 20
    assert losses("n1") == pytest.approx(losses("shard"), rel=1e-9)


@pytest.mark.parametrize("strategy, first, then", [("lora", "", "shard"), ("full", "shard", "")])
def test_a_divided_run_and_an_undivided_one_resume_each_other(inside, strategy, first, then):
    """Stopped in step 12, resumed from the checkpoint of step 10."""
    start(2, "tests/faults/two.py", "float64", "whole", strategy, then)
    start(2, "tests/faults/two.py", "float64", "cut", strategy, first, "12")
    shapes = load_file("cut/last/state.safetensors")
    again = start(2, "tests/faults/two.py", "float64", "cut", strategy, then)
    assert "resuming from cut/last, step 10" in again.stdout
    assert losses("cut") == pytest.approx(losses("whole"), rel=1e-9) and len(losses("cut")) == 20
    ends = [load_file(f"{folder}/last/weights.safetensors") for folder in ("cut", "whole")]
    torch.testing.assert_close(*ends, rtol=1e-9, atol=1e-12)
    found = load_file("whole/last/state.safetensors")
    shapes, found = ({n: t.shape for n, t in states.items()} for states in (shapes, found))
    assert shapes == found


def test_the_same_weights_give_the_same_checkpoint_divided_or_not(inside):
    """Before any step; each process of the divided one holds half of every weight."""
    held = []
    for shard in ("", "shard"):
        done = start(2, "tests/faults/two.py", "saved", f"saved{shard}", shard)
        held.append([int(line) for line in done.stdout.splitlines()])
    assert hashes(Path("saved/last")) == hashes(Path("savedshard/last"))
    (one, other), divided = held
    assert one == other == sum(divided) and max(divided) < 0.55 * one


SHARDED = ["--gradient_checkpointing", "--shard"]


@pytest.mark.parametrize(
    "name, flags",
    [
        ("finetune.py", ["--train_strategy=lora", "--lora_dropout=0"]),
        ("finetune.py", ["--llama_decoder_nums=4", "--cls_multiple_lambda=1"]),
        ("distill.py", ["--student_init=adapter", "--logit_lambda=0.1", "--sasrec_lambda=1"]),
        ("distill.py", ["--teacher_cache=off"]),
        ("distill.py", ["--distill_mode=online"]),
    ],
)
def test_a_divided_run_has_the_losses_and_ranks_of_one_that_is_not(inside, name, flags):
    """More evaluation batches than the second process has, and a last batch of a single user."""
    changed = {"--max_steps=50": "--max_steps=12", "--eval_batch_size=16": "--eval_batch_size=17"}
    short = [changed.get(flag, flag) for flag in RUN] + flags
    start(2, name, *short, *SHARDED, "--output_dir=divided")
    start(1, name, *short, "--output_dir=whole")
    assert losses("divided") == pytest.approx(losses("whole"), rel=1e-5)
    assert len(losses("whole")) == 12
    ours, theirs = ranks("divided"), ranks("whole")
    for key in theirs:  # a rank moves where two scores are equal to their last bits
        assert np.mean(np.not_equal(ours[key], theirs[key])) < 0.02


def test_a_divided_run_and_one_that_is_not_evaluate_each_other(inside):
    """Five batches: the second process has one less than the first."""
    flags = ["--max_steps=4", "--batch_size=32", "--eval_batch_size=24", "--train_strategy=lora"]
    start(2, "finetune.py", *flags, "--shard", "--output_dir=run")
    divided = ranks("run")
    start(1, "finetune.py", "--eval_only", "--output_dir=run")
    whole = ranks("run")
    start(2, "finetune.py", "--eval_only", "--shard", "--eval_batch_size=24", "--output_dir=run")
    again = ranks("run")
    assert len(whole["test_full"]) == 120
    for name in whole:  # a rank moves where two scores are equal to their last bits
        assert np.mean(np.not_equal(whole[name], divided[name])) < 0.02
        assert np.mean(np.not_equal(whole[name], again[name])) < 0.02


def test_sharding_needs_processes(inside):
    done = start(1, "finetune.py", "--shard", "--output_dir=run", status=2)
    assert "error: --shard divides the model among processes, and there is one" in done.stderr
    assert not Path("run").exists()


@pytest.mark.parametrize(
    "name, flags",
    [
        ("finetune.py", ["--llama_decoder_nums=2"]),
        ("distill.py", ["--logit_lambda=0.1"]),
        ("train_sr_trad.py", ["--loss=sampled", "--num_negatives=9", "--dropout=0"]),
    ],
)
def test_fifty_losses_and_all_ranks_are_those_of_one_process(inside, name, flags):
    if name == "distill.py":
        shutil.rmtree("output/demo/teacher_states")  # the first process fills it, the other waits
    for processes in (2, 1):
        start(processes, name, *RUN, *flags, f"--output_dir=n{processes}")
    assert losses("n1") == pytest.approx(losses("n2"), rel=1e-6) and len(losses("n1")) == 50
    one, two = (json.loads(Path(f"n{n}/results.json").read_text()) for n in (1, 2))
    assert one["test"]["sampled"] == pytest.approx(two["test"]["sampled"], abs=0.01)
    assert set(hashes(Path("n1"))) == set(hashes(Path("n2")))
    lines = Path("n2/metrics.jsonl").read_text().splitlines()
    assert len(lines) == 52  # fifty steps, two evaluations, one writer
    before = ranks("n1")
    start(2, name, "--eval_only", "--eval_batch_size=16", "--output_dir=n1")
    assert ranks("n1") == before


def test_a_process_that_dies_ends_the_run_with_a_message_and_the_run_goes_on_later(inside):
    flags = [flag for flag in RUN if flag != "--max_steps=50"]
    flags += ["--max_steps=6", "--save_steps=1", "--output_dir=run"]
    done = start(2, "tests/faults/two.py", "dying", "finetune", *flags, status=1)
    assert "SIGKILL" in done.stderr or "Signal 9" in done.stderr
    assert not Path("run/results.json").exists()
    again = start(2, "finetune.py", *flags)
    assert "resuming from run/last, step 2" in again.stdout
    start(1, "finetune.py", *flags[:-1], "--output_dir=whole")
    assert losses("run") == pytest.approx(losses("whole"), rel=1e-6)


def test_a_batch_that_does_not_divide_is_refused(inside):
    flags = "--batch_size=30", "--micro_batch_size=10", "--output_dir=run"
    told = "error: --batch_size=30 is not a multiple of 2 processes x --micro_batch_size=10"
    assert start(2, "finetune.py", *flags, status=2).stderr.count(told) == 1
    done = start(2, "train_sr_trad.py", "--batch_size=31", "--output_dir=run", status=2)
    assert "error: --batch_size=31 is not a multiple of 2 processes" in done.stderr
    assert not Path("run").exists()
