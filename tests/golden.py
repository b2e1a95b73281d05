"""Golden runs: short runs of the four scripts, and a hash of all they leave behind, by value.

    python tests/golden.py                    # about two minutes on 2 cores
    python tests/golden.py > before.txt       # on two commits: `diff` must be empty

A refactoring must not change a number. This file uses only the command lines of the scripts and the
files that they write, so that it runs on any commit. Hashes are comparable on one machine with one
set of library versions.
"""

import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from datasets.demo import write_demo  # noqa: E402  the path is set first

SHORT = "--batch_size 16 --eval_batch_size 64 --eval_steps 10 --save_steps 7 --log_steps 3"
LLM = f"{SHORT} --warmup_steps 4 --item_table table.pkl"
STUDENT = f"distill.py {LLM} --max_steps 24 --teacher teacher"
OFF = "--distill_lambda 0 --norm_lambda 0 --cls_multiple_lambda 0"
FIRST = {
    "sasrec": f"train_sr_trad.py {SHORT} --max_steps 40",
    "sasrec_last": f"train_sr_trad.py {SHORT} --max_steps 30 --train_targets last --norm pre",
    "sasrec_sampled": f"train_sr_trad.py {SHORT} --max_steps 30 --loss sampled --num_negatives 20",
}
TEACHERS = {
    "teacher": f"finetune.py {LLM} --max_steps 24 --cls_multiple_lambda 0.5 --distill_block 2",
    "teacher_lora": f"finetune.py {LLM} --max_steps 20 --train_strategy lora --lora_dropout 0.3",
    "teacher_prefixes": f"finetune.py {LLM} --max_steps 20 --llama_decoder_nums 2"
    " --train_targets all",
    "ce": f"distill.py {LLM} --max_steps 20 {OFF} --micro_batch_size 8",
    "online": f"distill.py {LLM} --max_steps 20 --distill_mode online --logit_lambda 0.5",
}
STUDENTS = {
    "cached": STUDENT,
    "live": f"{STUDENT} --teacher_cache off --logit_lambda 1 --temperature 2 --distill_block 2",
    "lora": f"{STUDENT} --teacher teacher_lora --train_strategy lora --lora_dropout 0.3",
    "from_teacher": f"{STUDENT} --student_init teacher --layer_selection interval",
    "mean": f"{STUDENT} --block_reduction mean --norm_form squared_l2",
}
NEW = ("block_ends", "teacher_block_ends")  # of the model in config.json, since 2026-11-28
# equals `lora`
KILLED = {"killed": f"{STUDENT} --teacher teacher_lora --train_strategy lora --lora_dropout 0.3"}


def start(name: str, line: str, folder: Path) -> subprocess.Popen:
    script, *flags = line.split()
    if flags.count("--teacher") > 1:  # the later one counts
        first = flags.index("--teacher")
        del flags[first : first + 2]
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(ROOT / script), *flags, "--output_dir", name]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=folder, env=env, **streams)


def run(name: str, line: str, folder: Path) -> None:
    process = start(name, line, folder)
    printed, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"{name} ended with status {process.returncode}:\n{printed}")


def run_killed(name: str, line: str, folder: Path) -> None:
    """SIGKILL once the run has a checkpoint, then the same command again."""
    process = start(name, line, folder)
    while process.poll() is None and not (folder / name / "last/manifest.json").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    run(name, line, folder)


def short(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def digest(arrays: dict[str, np.ndarray]) -> str:
    """Over names, types, shapes and bytes, in the order of the names."""
    total = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        total.update(f"{name} {array.dtype} {array.shape}".encode() + array.tobytes())
    return total.hexdigest()[:16]


def describe(folder: Path) -> list[str]:
    """A line per thing that a run leaves."""
    lines = []
    for part in ("best/weights", "best/state", "last/weights", "last/state"):
        lines.append(f"{part} {digest(load_file(folder / f'{part}.safetensors'))}")
    with np.load(folder / "ranks.npz", allow_pickle=False) as ranks:
        names = [name for name in ranks.files if name.startswith(("valid_", "test_"))]
        counted = {name: ranks[name].astype(np.int64) for name in names}
        lines.append(f"ranks {digest(counted)}")
    results = json.loads((folder / "results.json").read_text())
    config = json.loads((folder / "config.json").read_text())
    model = {name: v for name, v in config.get("model", {}).items() if name not in NEW} or None
    for name, content in (
        ("metrics", [results["valid"], results["test"], results["steps"], results["best_step"]]),
        ("model", model),
        ("log", "".join(map(without_speed, open(folder / "metrics.jsonl")))),
    ):
        lines.append(f"{name} {short(json.dumps(content, sort_keys=True).encode())}")
    return lines


def without_speed(line: str) -> str:
    """A line of metrics.jsonl as it was before it had users per second and memory."""
    event = {k: v for k, v in json.loads(line).items() if k not in ("users_per_second", "peak_mib")}
    return json.dumps(event) + "\n"


def main() -> None:
    with tempfile.TemporaryDirectory() as place, ThreadPoolExecutor(2) as pool:
        folder = Path(place)
        write_demo(folder / "data/demo.csv", n_users=120, n_items=160)
        list(pool.map(lambda item: run(*item, folder), FIRST.items()))
        extract = [sys.executable, ROOT / "extract_emb.py", "--sasrec", "sasrec"]
        extract += ["--item_table", "table.pkl"]
        subprocess.run(extract, cwd=folder, check=True, capture_output=True)
        print("table", short((folder / "table.pkl").read_bytes()), flush=True)
        # the built-in base is written once, before two runs look for it
        run("base", f"finetune.py {LLM} --max_steps 1", folder)
        for runs in (TEACHERS, STUDENTS):
            list(pool.map(lambda item: run(*item, folder), runs.items()))
        for name, line in KILLED.items():
            run_killed(name, line, folder)
        for name in (*FIRST, *TEACHERS, *STUDENTS, *KILLED):
            for line in describe(folder / name):
                print(name, line, flush=True)
        states: dict[str, list[str]] = {}
        for path in sorted((folder / "teacher_states").rglob("*.bin")):
            whole = hashlib.sha256(path.read_bytes()).hexdigest()
            states.setdefault(path.name, []).append(whole)
        for name, hashes in states.items():
            print("teacher_states", name, short(" ".join(sorted(hashes)).encode()), flush=True)


if __name__ == "__main__":
    main()
