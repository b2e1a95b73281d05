"""The catalogue's faults that need no kill: damage, full disks, numbers that are none, locks."""

import functools
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch

import distill
import extract_emb
import finetune
import models.losses
import train_sr_trad
from datasets.demo import write_demo
from datasets.inputs import read_sequences
from engine import checkpoint, cli, files, processes
from engine.errors import RunError, UsageError
from engine.folder import await_put_back, put_back
from engine.run import Run
from tests.conftest import ROOT, SHORT, hashes, refused, script, stop_at_step, trained_lines
from utils import evaluation

pytestmark = pytest.mark.slow
RUN = {"max_steps": 12, "batch_size": 32, "eval_batch_size": 64, "eval_steps": 4}
RUN |= {"save_steps": 3, "log_steps": 2, "output_dir": "run"}
FILES = ("weights.safetensors", "state.safetensors", "meta.json", "manifest.json")


@pytest.fixture
def broken_off(inside, monkeypatch):
    """SASRec stopped in step 8, best/ of step 4, last/ of step 6; the hashes of a whole run."""
    train_sr_trad.main(**RUN | {"output_dir": "whole"})
    with monkeypatch.context() as patch:
        stop_at_step(patch, 8)
        with pytest.raises(RunError, match="stopped here"):
            train_sr_trad.main(**RUN)
    assert [checkpoint.load(f"run/{name}")[1]["step"] for name in ("best", "last")] == [4, 6]
    return left("whole")


def left(folder="run"):
    found = hashes(Path(folder))
    return {n: value for n, value in found.items() if n.startswith(("best", "last", "metrics"))}


def words(**changes):
    return [f"--{name}={value}" for name, value in (RUN | changes).items()]


def damage(path, kind):
    data = path.read_bytes()
    flipped = data[:-7] + bytes([data[-7] ^ 4]) + data[-6:]
    if kind == "deleted":
        path.unlink()
    else:
        path.write_bytes({"cut": data[: len(data) // 2], "empty": b"", "flipped": flipped}[kind])


@pytest.mark.parametrize("kind", ["deleted", "cut", "empty", "flipped"])
@pytest.mark.parametrize("file", FILES)
def test_f4_a_damaged_last_checkpoint_is_passed_over_for_the_best(broken_off, file, kind, capsys):
    damage(Path("run/last") / file, kind)
    train_sr_trad.main(**RUN)
    printed = capsys.readouterr().out
    assert "resuming from run/best, step 4" in printed and re.search("skipped: .*run/last", printed)
    assert file in printed or file == "manifest.json"  # an altered manifest accuses the files
    assert left() == broken_off


@pytest.mark.parametrize("kind", ["deleted", "cut", "empty", "flipped"])
@pytest.mark.parametrize("file", FILES)
def test_f4_a_damaged_best_checkpoint_is_never_made_up(broken_off, file, kind):
    damage(Path("run/best") / file, kind)
    before = hashes(Path("run"))
    told = "run/best: the best checkpoint is missing or damaged.*--overwrite starts from"
    with pytest.raises(UsageError, match=told):
        train_sr_trad.main(**RUN)
    assert hashes(Path("run")) == before
    damage(Path("run/last") / file, kind)
    with pytest.raises(UsageError, match="nothing to resume from: --overwrite starts from scratch"):
        train_sr_trad.main(**RUN)
    train_sr_trad.main(**RUN, overwrite=True)
    assert left() == broken_off


def test_f5_strays_do_not_matter(broken_off):
    shutil.rmtree("run/last")
    Path("run/last").mkdir()  # an empty newest one
    Path("run/.tmp-last-99").mkdir()
    Path("run/checkpoint-abc").mkdir()
    Path("run/checkpoint-7").write_text("a file")
    train_sr_trad.main(**RUN)
    assert left() == broken_off
    assert not Path("run/.tmp-last-99").exists() and Path("run/checkpoint-7").exists()


def test_f5_a_kill_while_the_old_one_is_removed_leaves_nothing_of_it(broken_off):
    train_sr_trad.main(**RUN)
    Path("run/results.json").unlink()  # killed after its last step: nothing is saved again
    Path("run/.old-best").mkdir()
    Path("run/.old-best/weights.safetensors").write_bytes(b"old")
    train_sr_trad.main(**RUN)
    assert left() == broken_off and not Path("run/.old-best").exists()


OTHER = r"an unfinished run from something else: data_sha256 is .* \(the run has .*; choose another"
CHANGED = [
    ({"batch_size": 16}, r"=16 \(the run has 32\); give its flags to resume it, or --overwrite"),
    ({"seed": 1}, r"--seed=1 \(the run has 42\)"),
    ({"num_blocks": 1}, r"--num_blocks=1 \(the run has 2\)"),
    ({"data_path": "data/other.csv"}, f"{OTHER} folder, or --overwrite starts from scratch"),
]


@pytest.mark.parametrize("changes, line", CHANGED)
def test_f11_going_on_with_other_flags_or_data_is_refused(broken_off, changes, line):
    write_demo("data/other.csv", n_users=120, n_items=150)
    before = hashes(Path("run"))
    with pytest.raises(UsageError, match=line):
        train_sr_trad.main(**RUN | changes)
    assert hashes(Path("run")) == before


def test_f11_a_student_of_another_teacher_or_table_is_refused(inside, monkeypatch):
    for main, folder in ((finetune.main, "t"), (distill.main, "s")):
        with monkeypatch.context() as patch, pytest.raises(RunError):
            stop_at_step(patch, 2)
            main(**SHORT, save_steps=1, output_dir=folder)
    finetune.main(**SHORT, seed=5, output_dir="other")
    with pytest.raises(UsageError, match=r"teacher_sha256 is .* \(the run has"):
        distill.main(**SHORT, teacher="other", output_dir="s")
    train_sr_trad.main(**SHORT, seed=5, overwrite=True)
    extract_emb.main()
    with pytest.raises(UsageError, match=r"table_sha256 is .* \(the run has"):
        finetune.main(**SHORT, output_dir="t")


def test_row_68_and_f6_a_full_disk_keeps_the_checkpoint_and_says_what_is_needed(broken_off):
    kept = hashes(Path("run/last"))

    def limit():  # no file above 64 KiB can be written; works for root too
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, 2**16))

    files.release_lock(Path("run"))
    command = [sys.executable, ROOT / "train_sr_trad.py", *words()]
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=limit)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith("error: run/") and "bytes needed" in line
    assert "free; the checkpoint that was there stays" in line
    assert hashes(Path("run/last")) == kept and not list(Path("run").glob(".tmp-*"))
    train_sr_trad.main(**RUN)
    assert left() == broken_off


def test_f8_a_gradient_that_is_no_number_stops_the_run_and_is_never_logged(inside, monkeypatch):
    plain, calls = models.losses.next_item, []

    def spoiled(users, *args):
        value = plain(users, *args)
        calls.append(1)
        return value + (users.sum() * 0).sqrt() if len(calls) == 8 else value

    monkeypatch.setattr(models.losses, "next_item", spoiled)
    with pytest.raises(RunError) as error:
        finetune.main(**RUN)
    line = str(error.value)
    assert line.startswith("step 8: the loss or a gradient is not finite")
    assert "(ce " in line and "of users U0" in line and "kept: run/best and run/last" in line
    assert checkpoint.load("run/last")[1]["step"] == 6
    logged = [json.loads(line) for line in open("run/metrics.jsonl")]
    numbers = [v for line in logged for v in line.values() if isinstance(v, float)]
    assert max(line["step"] for line in logged) <= 7 and np.isfinite(numbers).all()


TOLD = "step 8, validation: a score of user 0 is NaN.*the checkpoints that were there are kept"


def test_f8_a_metric_that_is_no_number_stops_the_run(inside, monkeypatch):
    plain, looks = evaluation.rank_users, []

    def spoiled(users, columns, batch, shown=None):
        looks.extend([1] * (users.shape[1] > 1))  # popularity's are of width one
        return plain(users * np.nan if len(looks) > 4 else users, columns, batch, shown)

    monkeypatch.setattr(evaluation, "rank_users", spoiled)
    with pytest.raises(RunError, match=TOLD):
        train_sr_trad.main(**RUN)
    assert checkpoint.load("run/best")[1]["step"] == 4


ON_CUDA = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")


NO_MEMORY = [(None, "can't allocate memory"), (ON_CUDA, "CUDA out"), (MemoryError(), "MemoryEr")]


@pytest.mark.parametrize("error, told", NO_MEMORY)
def test_f9_out_of_memory_is_one_line_with_the_flags_to_lower(error, told, capsys):
    @cli.command
    def main():
        if error is not None:
            raise error
        torch.empty(2**55, dtype=torch.uint8)

    with pytest.raises(SystemExit) as end:
        cli.run(main, [])
    line = capsys.readouterr().err
    assert end.value.code == 1 and line.count("\n") == 1 and told in line
    assert "lower --micro_batch_size or --eval_batch_size and run the command again" in line


def test_f9_a_process_whose_peer_ended_says_so_in_one_line(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(processes, "_end", lambda status, line: sys.exit(f"{status} {line}"))
    with pytest.raises(SystemExit, match="1 error: process 0: another process ended .*gloo"):
        processes.call(lambda: exec('raise RuntimeError("[gloo/pair.cc] closed by peer")'))


def test_f13_a_second_process_is_kept_out_and_a_dead_ones_lock_is_free(inside):
    Path("run").mkdir()
    holder = "import sys, time; from pathlib import Path; from engine import files;"
    holder += "files.take_lock(Path('run')); print(flush=True); time.sleep(60)"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", holder]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as process:
        process.stdout.readline()
        done = script("train_sr_trad.py", "--output_dir=run", cwd=inside, status=2)
        process.kill()
    line = rf"error: --output_dir=run: process {process.pid} on \S+ is at work in it; wait, or"
    assert re.match(line, done.stderr)
    assert sorted(os.listdir("run")) == [".lock", ".lock-owner"]
    train_sr_trad.main(**RUN)
    assert not Path("run/.lock-owner").exists()


def test_f13_a_run_that_is_read_or_evaluated_does_not_change_meanwhile(inside, monkeypatch):
    teacher, ranked, patch = Path("output/demo/teacher"), evaluation.evaluate, monkeypatch
    shutil.copytree(teacher, "kept")

    swaps = functools.partial(shutil.copytree, "output/demo/student/best", "kept/best")
    evaluate = Mock(side_effect=lambda *a, **b: swaps(dirs_exist_ok=True) and ranked(*a, **b))
    with patch.context() as context, pytest.raises(RunError, match="kept/best was replaced mean"):
        context.setattr(evaluation, "evaluate", evaluate)
        finetune.main(eval_only=True, output_dir="kept")
    with patch.context() as context:  # nobody may write there
        context.setattr(files, "take_lock", Mock(side_effect=PermissionError))
        assert files.lock_owner(teacher) is None
    patch.setattr(files, "lock_owner", {teacher: "7 on x"}.get)
    with pytest.raises(UsageError, match="--teacher=output/demo/teacher: process 7 on x is at"):
        distill.main(**SHORT, output_dir="s")
    with pytest.raises(UsageError, match="--init_from=output/demo/teacher: process 7 on x is at"):
        finetune.main(**SHORT, init_from=teacher.as_posix(), output_dir="t")
    Path("r/.replaced").mkdir(parents=True)
    threading.Timer(0.2, put_back, [Path("r")]).start()
    await_put_back(Path("r"))  # another process than the first
    assert not Path("r/.replaced").exists()


def test_f13_the_precision_that_a_run_has_may_be_said(inside):
    finetune.main(**SHORT, bf16=False)  # on a CPU that is what it had by default
    with pytest.raises(UsageError, match="with other flags: --bf16=True .the run has False"):
        finetune.main(**SHORT, bf16=True)


def test_f16_a_closed_pipe_ends_the_run_without_a_traceback(inside):
    command = [sys.executable, "-u", ROOT / "train_sr_trad.py", *words()]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, text=True, **pipes)
    process.stdout.readline()
    process.stdout.close()
    told = process.stderr.read()
    assert process.wait() in (0, 141) and "Traceback" not in told


def test_f17_odd_places(inside, tmp_path, monkeypatch):
    """A folder with blanks and umlauts, data behind a link in a folder nobody may write to."""
    real = tmp_path / "nur lesen"
    shutil.copytree("data", real)
    os.chmod(real, 0o555)
    place = tmp_path / "ein Ort für Läufe"
    place.mkdir()
    monkeypatch.chdir(place)
    Path("data").symlink_to(real)
    train_sr_trad.main(**SHORT)
    extract_emb.main()
    finetune.main(**SHORT, output_dir="Lehrer 1")
    assert distill.main(**SHORT, teacher="Lehrer 1")["users"] == 120


@pytest.mark.parametrize("flags", [{}, {"teacher_cache": "off"}, {"student_init": "teacher"}])
def test_f19_base_and_teacher_are_never_written_to(inside, flags):
    before = hashes(Path("output/demo/teacher")) | hashes(Path("output/base"))
    distill.main(**SHORT, **flags, output_dir="s")
    assert hashes(Path("output/demo/teacher")) | hashes(Path("output/base")) == before


def test_f20_five_steps_give_the_losses_that_they_gave(inside):
    """Stored on 2026-11-28, torch 2.13 CPU: a change of the method or its draws must be meant."""
    five = SHORT | {"max_steps": 5, "log_steps": 1, "warmup_steps": 0}
    train_sr_trad.main(**five, output_dir="sasrec")
    extract_emb.main(sasrec="sasrec", item_table="table.pkl")
    five |= {"warmup_steps": 50}
    finetune.main(**five, item_table="table.pkl", output_dir="teacher")
    five |= {"item_table": "table.pkl", "teacher": "teacher", "student_init": "base"}
    distill.main(**five, output_dir="student")
    golden = json.loads((Path(__file__).parent / "golden.json").read_text())
    for folder, expected in golden.items():
        found = [line["total"] for line in trained_lines(folder)]
        assert found == pytest.approx(expected, rel=1e-5), folder


def test_evaluating_an_unfinished_run_does_not_finish_it(broken_off):
    train_sr_trad.main(eval_only=True, output_dir="run")
    assert json.loads(Path("run/results.json").read_text())["steps"] is None
    train_sr_trad.main(**RUN)
    assert left() == broken_off


def test_flags_that_change_no_result_may_differ_when_a_run_is_resumed(inside, monkeypatch, capsys):
    with monkeypatch.context() as patch, pytest.raises(RunError):
        stop_at_step(patch, 4)
        finetune.main(**RUN, micro_batch_size=8)
    capsys.readouterr()
    changes = {"micro_batch_size": 16, "eval_batch_size": 50, "gradient_checkpointing": True}
    results = finetune.main(**RUN | changes)
    printed = capsys.readouterr().out
    assert "resuming with --micro_batch_size=16 (was 8), --eval_batch_size=50 (was 64)" in printed
    assert "--gradient_checkpointing=True (was False): speed and rounding may change" in printed
    steps = [line["step"] for line in map(json.loads, open("run/metrics.jsonl"))]
    assert results["steps"] == RUN["max_steps"] and steps == sorted(steps)


def test_a_run_without_a_checkpoint_holds_nothing_back(inside, monkeypatch):
    """Where a run failed before its first checkpoint, other flags start from scratch."""
    with monkeypatch.context() as patch, pytest.raises(RunError):
        stop_at_step(patch, 1)
        finetune.main(**RUN)
    assert Path("run/config.json").exists()
    finetune.main(**RUN | {"batch_size": 16})
    assert json.loads(Path("run/config.json").read_text())["flags"]["batch_size"] == 16


def test_a_run_that_came_in_between_is_not_wiped(inside):
    """Another process finishes in the folder after this one looked at it and before it takes it."""
    groups = [*cli._arguments(train_sr_trad.main, RUN).values()]
    run = Run.open("sasrec", Path("run"), groups, read_sequences(groups[0]))
    run.prepare()
    train_sr_trad.main(**RUN)
    before, told = hashes(Path("run")), "another process changed it in the meantime"
    with pytest.raises(UsageError, match=told), run.training():
        pass
    assert hashes(Path("run")) == before


def test_a_folder_with_files_of_someone_else_is_left_alone(inside):
    Path("mine/best").mkdir(parents=True)
    Path("mine/best/thesis.txt").write_text("x")
    for overwrite in (False, True):
        with refused("--output_dir=mine holds best but no run's config.json"):
            train_sr_trad.main(**RUN | {"output_dir": "mine", "overwrite": overwrite})
    assert Path("mine/best/thesis.txt").exists()


def test_weights_that_are_not_finite_are_never_saved(inside):
    told = "step 1: the weights .* are not finite any more; no checkpoint was written yet"
    with pytest.raises(RunError, match=told):
        train_sr_trad.main(**RUN | {"learning_rate": 3e38, "save_steps": 1})
    assert not Path("run/last").exists()


def test_an_unfinished_teacher_is_told_and_its_precision_comes_again(inside, capsys):
    first = finetune.main(**RUN, bf16=True)
    assert finetune.main(eval_only=True, output_dir="run")["test"] == first["test"]
    with pytest.raises(UsageError, match="--bf16=False contradicts the run in run, which has True"):
        finetune.main(eval_only=True, bf16=False, output_dir="run")
    Path("run/results.json").unlink()
    distill.main(**SHORT, teacher="run", output_dir="s")
    said = "the teacher run in run is unfinished: its best checkpoint so far is read"
    assert said in capsys.readouterr().out


def test_other_library_versions_are_told_once(broken_off, capsys):
    path = Path("run/config.json")
    config = json.loads(path.read_text())
    config["versions"]["torch"], config["threads"] = "1.0", 64
    path.write_text(json.dumps(config))
    train_sr_trad.main(**RUN)
    said = "resuming with other library versions, so not bit for bit: torch 1.0 -> "
    printed = capsys.readouterr().out
    assert printed.count(f"{said}{torch.__version__}\n") == 1
    assert "threads, not 64: not bit for bit" in printed


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_damaged_config_says_what_to_do(broken_off, overwrite):
    Path("run/config.json").write_text("{")
    before = hashes(Path("run"))
    told = "--output_dir: run/config.json: damaged, not JSON; choose another folder, or remove this"
    with pytest.raises(UsageError, match=f"^{told} one$"):
        train_sr_trad.main(**RUN, overwrite=overwrite)
    assert hashes(Path("run")) == before
