"""A killed run that starts again ends with the bytes of one that was not (F1, F2, F3, F18)."""

import json
import random
import shutil
from pathlib import Path

import pytest

from tests.conftest import hashes, script

pytestmark = pytest.mark.slow
RUN = ["--max_steps=12", "--batch_size=32", "--eval_batch_size=64", "--eval_steps=4"]
RUN += ["--save_steps=3", "--log_steps=2", "--warmup_steps=3"]
ONLINE = ["--distill_mode=online", "--llama_decoder_nums_teacher=4"]
LORA = ["--lora_dropout=0.3", "--train_strategy=lora"]
CASES = {  # four optimizer steps per epoch of the shrunken demo
    "sasrec": ("train_sr_trad", RUN),
    "sasrec, sampled loss": ("train_sr_trad", [*RUN, "--loss=sampled", "--num_negatives=9"]),
    "teacher": ("finetune", [*RUN, *LORA, "--llama_decoder_nums=4", "--micro_batch_size=8"]),
    "student, cached": ("distill", [*RUN, *LORA]),
    "student, live": ("distill", [*RUN, *LORA, "--teacher_cache=off"]),
    "student, online": ("distill", [*RUN, *LORA, *ONLINE]),
}


def sequence(name, plan, flags, folder):
    """Statuses of a plan's runs in `folder`, and what the last one left, without times."""
    command = "tests/faults/kills.py", name, json.dumps(plan), *flags, f"--output_dir={folder}"
    done = script(*command, cwd=Path.cwd(), OMP_NUM_THREADS="1")
    *killed, last = json.loads(done.stdout)
    assert last == 0, Path("log.txt").read_text()[-3000:]
    left = hashes(Path(folder))
    results = json.loads((Path(folder) / "results.json").read_text())
    left["results.json"] = {name: value for name, value in results.items() if "second" not in name}
    # they hold the folder's name and zip's times; ranks are behind results.json
    return killed, {n: v for n, v in left.items() if n not in ("config.json", "ranks.npz")}


@pytest.fixture(scope="module")
def uninterrupted(house, tmp_path_factory):
    """A copy of the house, and for each case what a run leaves that nobody killed."""
    folder = tmp_path_factory.mktemp("kills") / "house"
    shutil.copytree(house[0], folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        runs = [(case, *how, f"whole {i}") for i, (case, how) in enumerate(CASES.items())]
        left = {case: sequence(name, [], flags, run)[1] for case, name, flags, run in runs}
    return folder, left


@pytest.mark.parametrize("case", CASES)
def test_killed_at_every_stage_of_writing_a_checkpoint(uninterrupted, case, monkeypatch):
    """In 12 to 16 operations; half of the cases die in the odd ones, half in the even ones."""
    folder, expected = uninterrupted
    monkeypatch.chdir(folder)
    name, flags = CASES[case]
    plan = [["stage", n] for n in range(1 + list(CASES).index(case) % 2, 17, 2)]
    statuses, left = sequence(name, plan, flags, f"stages {case}")
    assert len(statuses) >= 7 and set(statuses) == {137}, statuses
    assert left == expected[case]


@pytest.mark.parametrize("case", CASES)
def test_killed_in_steps_and_at_random_moments(uninterrupted, case, monkeypatch):
    """In the first step, in an epoch, at its end; then at moments drawn once for all."""
    folder, expected = uninterrupted
    monkeypatch.chdir(folder)
    name, flags = CASES[case]
    moments = random.Random(case)
    (folder / "log.txt").unlink(missing_ok=True)
    plan = [["step", n] for n in (1, 2, 4, 5)]
    plan += [["after", moments.uniform(0.05, 0.6)] for _ in range(3)]
    statuses, left = sequence(name, plan, flags, f"moments {case}")
    assert len(statuses) >= 4 and set(statuses) == {137}, statuses
    assert left == expected[case]
    assert "holds an unfinished run without a checkpoint" in (folder / "log.txt").read_text()


@pytest.mark.parametrize(
    "case, names", [("sasrec", ["last", "last", "best", "best"]), ("student, cached", ["last"] * 4)]
)
def test_killed_again_and_again_between_the_two_renames(uninterrupted, case, names, monkeypatch):
    folder, expected = uninterrupted
    monkeypatch.chdir(folder)
    name, flags = CASES[case]
    plan = [["between", checkpoint] for checkpoint in names]
    statuses, left = sequence(name, plan, flags, f"between {case}")
    assert statuses == [137] * 4
    assert left == expected[case]


def test_killed_between_the_best_and_the_last_of_the_final_step(uninterrupted, monkeypatch):
    """No step is left to do, and the last/ of an earlier one is not taken for the final one."""
    folder, expected = uninterrupted
    monkeypatch.chdir(folder)
    name, flags = CASES["sasrec"]
    assert expected["sasrec"]["results.json"]["best_step"] == 12
    (folder / "log.txt").unlink(missing_ok=True)
    # the fourth: steps 3, 6, 9, 12
    statuses, left = sequence(name, [["last", 4]], flags, "final step")
    assert statuses == [137]
    assert left == expected["sasrec"]
    assert "resuming from final step/best, step 12" in (folder / "log.txt").read_text()


@pytest.mark.parametrize("kind, status", [("term", 143), ("int", 130)])
def test_a_signal_lets_the_step_finish_and_saves(uninterrupted, kind, status, monkeypatch):
    folder, expected = uninterrupted
    monkeypatch.chdir(folder)
    name, flags = CASES["teacher"]
    (folder / "log.txt").unlink(missing_ok=True)
    plan = [[kind, n] for n in (1, 2, 1, 4, 3, 1)]  # the last one in step 12
    statuses, left = sequence(name, plan, flags, f"signal {kind}")
    assert statuses == [status] * 6
    assert left == expected["teacher"]
    assert "the same command resumes from there" in (folder / "log.txt").read_text()
