"""A run that is killed and started again ends with the bytes of one that was not (catalogue F1, F2,
F3, F18).
"""

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, hashes

pytestmark = pytest.mark.slow
RUN = [
    "--max_steps=12",
    "--batch_size=32",
    "--eval_batch_size=64",
    "--eval_steps=4",
    "--save_steps=3",
    "--log_steps=2",
    "--warmup_steps=3",
]
LORA = ["--lora_dropout=0.3", "--train_strategy=lora"]
CASES = {  # four optimizer steps per epoch of the shrunken demo
    "sasrec": ("train_sr_trad", RUN),
    "sasrec, sampled loss": ("train_sr_trad", [*RUN, "--loss=sampled", "--num_negatives=9"]),
    "teacher": ("finetune", [*RUN, *LORA, "--llama_decoder_nums=4", "--micro_batch_size=8"]),
    "student, cached": ("distill", [*RUN, *LORA]),
    "student, live": ("distill", [*RUN, *LORA, "--teacher_cache=off"]),
    "student, online": (
        "distill",
        [*RUN, *LORA, "--distill_mode=online", "--llama_decoder_nums_teacher=4"],
    ),
}

SURVIVED: list[str] = []  # a case's name for every SIGKILL that was sent


def sequence(script, plan, flags, folder):
    """Statuses of the runs of a plan in `folder`, and what the last one left without the times it
    took.
    """
    done = subprocess.run(
        [
            sys.executable,
            ROOT / "tests/faults/kills.py",
            script,
            json.dumps(plan),
            *flags,
            f"--output_dir={folder}",
        ],
        capture_output=True,
        text=True,
        env={
            "PATH": "/usr/bin:/bin",
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "HOME": "/tmp",
        },
    )
    assert done.returncode == 0, done.stderr
    *killed, last = json.loads(done.stdout)
    assert last == 0, Path("log.txt").read_text()[-3000:]
    left = hashes(Path(folder))
    results = json.loads((Path(folder) / "results.json").read_text())
    left["results.json"] = {name: value for name, value in results.items() if "second" not in name}
    for name in (
        "config.json",
        "ranks.npz",
    ):  # they hold the folder's name and zip's times; ranks are behind results.json
        left.pop(name)
    return killed, left


@pytest.fixture(scope="module")
def uninterrupted(house, tmp_path_factory):
    """A copy of the house, and for each case what a run leaves that nobody killed."""
    folder = tmp_path_factory.mktemp("kills") / "house"
    shutil.copytree(house[0], folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        left = {
            case: sequence(script, [], flags, f"whole {i}")[1]
            for i, (case, (script, flags)) in enumerate(CASES.items())
        }
    return folder, left


@pytest.mark.parametrize("case", CASES)
def test_killed_at_every_stage_of_writing_a_checkpoint(uninterrupted, case, monkeypatch):
    """A checkpoint is written in 12 to 16 operations; half of the cases die in the odd ones, half
    in the even ones.
    """
    folder, expected = uninterrupted
    monkeypatch.chdir(folder)
    script, flags = CASES[case]
    plan = [["stage", n] for n in range(1 + list(CASES).index(case) % 2, 17, 2)]
    statuses, left = sequence(script, plan, flags, f"stages {case}")
    assert len(statuses) >= 7 and set(statuses) == {137}, statuses
    assert left == expected[case]
    SURVIVED.extend([case] * len(statuses))


@pytest.mark.parametrize("case", CASES)
def test_killed_in_steps_and_at_random_moments(uninterrupted, case, monkeypatch):
    """In the first step, in an epoch, at its end; then at moments drawn once for all."""
    folder, expected = uninterrupted
    monkeypatch.chdir(folder)
    script, flags = CASES[case]
    moments = random.Random(case)
    (folder / "log.txt").unlink(missing_ok=True)
    plan = [
        ["step", 1],
        ["step", 2],
        ["step", 4],
        ["step", 5],
        *[["after", moments.uniform(0.05, 0.6)] for _ in range(3)],
    ]
    statuses, left = sequence(script, plan, flags, f"moments {case}")
    assert len(statuses) >= 4 and set(statuses) == {137}, statuses
    assert left == expected[case]
    SURVIVED.extend([case] * len(statuses))
    assert "holds an unfinished run without a checkpoint" in (folder / "log.txt").read_text()


@pytest.mark.parametrize(
    "case, names", [("sasrec", ["last", "last", "best", "best"]), ("student, cached", ["last"] * 4)]
)
def test_killed_again_and_again_between_the_two_renames(uninterrupted, case, names, monkeypatch):
    folder, expected = uninterrupted
    monkeypatch.chdir(folder)
    script, flags = CASES[case]
    statuses, left = sequence(
        script, [["between", name] for name in names], flags, f"between {case}"
    )
    assert statuses == [137] * 4
    assert left == expected[case]


def test_killed_between_the_best_and_the_last_of_the_final_step(uninterrupted, monkeypatch):
    """No step is left to do, and the last/ of an earlier one is there: it is not taken for the
    final one.
    """
    folder, expected = uninterrupted
    monkeypatch.chdir(folder)
    script, flags = CASES["sasrec"]
    assert expected["sasrec"]["results.json"]["best_step"] == 12
    (folder / "log.txt").unlink(missing_ok=True)
    # the fourth: steps 3, 6, 9, 12
    statuses, left = sequence(script, [["last", 4]], flags, "final step")
    assert statuses == [137]
    assert left == expected["sasrec"]
    assert "resuming from final step/best, step 12" in (folder / "log.txt").read_text()


@pytest.mark.parametrize("kind, status", [("term", 143), ("int", 130)])
def test_a_signal_lets_the_step_finish_and_saves(uninterrupted, kind, status, monkeypatch):
    folder, expected = uninterrupted
    monkeypatch.chdir(folder)
    script, flags = CASES["teacher"]
    (folder / "log.txt").unlink(missing_ok=True)
    # the last one in step 12
    statuses, left = sequence(
        script, [[kind, n] for n in (1, 2, 1, 4, 3, 1)], flags, f"signal {kind}"
    )
    assert statuses == [status] * 6
    assert left == expected["teacher"]
    assert "the same command resumes from there" in (folder / "log.txt").read_text()


def test_a_finished_run_is_not_touched(uninterrupted, monkeypatch):
    folder, _ = uninterrupted
    monkeypatch.chdir(folder)
    before = hashes(Path("whole 0"))
    script, flags = CASES["sasrec"]
    done = subprocess.run(
        [sys.executable, ROOT / f"{script}.py", *flags, "--output_dir=whole 0"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "holds this command's finished run" in done.stdout
    assert hashes(Path("whole 0")) == before


def test_how_many_kills_were_survived():
    if set(SURVIVED) != set(CASES):
        pytest.skip("counts what the tests above did, and not all of them ran")
    print(f"{len(SURVIVED)} kills survived")
    assert len(SURVIVED) >= 60
