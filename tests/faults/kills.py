"""Runs a script again and again, killed as planned, until it comes to its end; libraries are
imported once and every run is a fork.

    python kills.py SCRIPT PLAN.json FLAGS...

PLAN is a list of [kind, value]: ["stage", n]: SIGKILL at the n-th file operation of writing
checkpoints; ["step", n]: SIGKILL in the n-th optimizer step of that process; ["between", name]:
SIGKILL between the two renames that replace a checkpoint; ["last", n]: SIGKILL before its n-th
last/ is begun; ["after", s]: SIGKILL after so many seconds; ["term", n], ["int", n]:
SIGTERM, SIGINT in the n-th optimizer step. Prints a JSON list of exit statuses as a shell has them
(137 for SIGKILL), up to the run that came to its end.
"""

import importlib
import json
import os
import pathlib
import shutil
import signal
import sys
import time

ROOT = pathlib.Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402  the path is set first

import distill  # noqa: E402, F401
import finetune  # noqa: E402, F401
import models.llm4rec  # noqa: E402
import models.lora  # noqa: E402
import models.sasrec  # noqa: E402
import models.teachers  # noqa: E402, F401
import train_sr_trad  # noqa: E402, F401
from engine import checkpoint, cli  # noqa: E402


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_at_stage(n: int) -> None:
    """Die in the n-th file operation of a checkpoint: before it, or in the middle of a write."""
    left = [n]

    def due() -> bool:
        left[0] -= 1
        return left[0] == 0

    def wrapped(function):
        def call(*args, **kwargs):
            if due():
                die()
            return function(*args, **kwargs)

        return call

    class Half:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.file.close()

        def __getattr__(self, name):
            return getattr(self.file, name)

        def write(self, data):
            if due():
                self.file.write(data[: len(data) // 2])
                self.file.flush()
                die()
            return self.file.write(data)

    def half_open(*args):
        return Half(open(*args))

    checkpoint.open = half_open
    os.fsync = wrapped(os.fsync)
    shutil.rmtree = wrapped(shutil.rmtree)
    pathlib.Path.rename = wrapped(pathlib.Path.rename)


def kill_between(name: str) -> None:
    """Die where the old checkpoint has stepped aside and the new one is not yet in its place."""
    rename = pathlib.Path.rename

    def call(self, target):
        aside = self.with_name(f".old-{name}").exists()
        if aside and self.name.startswith(".tmp-") and pathlib.Path(target).name == name:
            die()
        return rename(self, target)

    pathlib.Path.rename = call


def kill_before_last(n: int) -> None:
    """Die where the best/ of a step may be there and the n-th last/ is not begun."""
    left, save = [n], checkpoint.save

    def counted(folder, *args):
        left[0] -= pathlib.Path(folder).name == "last"
        if left[0] == 0:
            die()
        save(folder, *args)

    checkpoint.save = counted


def kill_at_step(n: int, number: int = signal.SIGKILL) -> None:
    left, step = [n], torch.optim.AdamW.step

    def counted(self, *args, **kwargs):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), number)
        return step(self, *args, **kwargs)

    torch.optim.AdamW.step = counted


def run(main, flags: list[str], kind: str, value: float) -> int:
    child = os.fork()
    if child == 0:
        log = os.open("log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        torch.set_num_threads(1)
        prepare = {
            "stage": kill_at_stage,
            "step": kill_at_step,
            "between": kill_between,
            "last": kill_before_last,
            "term": lambda n: kill_at_step(n, signal.SIGTERM),
            "int": lambda n: kill_at_step(n, signal.SIGINT),
        }
        prepare.get(kind, lambda _: None)(value)
        status = 0
        try:
            cli.run(main, flags)
        except SystemExit as end:
            status = end.code or 0
        except BaseException:
            import traceback

            traceback.print_exc()
            status = 99
        sys.stdout.flush()
        os._exit(status)
    if kind == "after":
        until = time.monotonic() + value
        look = os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT
        while time.monotonic() < until and os.waitid(*look) is None:
            time.sleep(0.005)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return 128 + os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


if __name__ == "__main__":
    module, plan, *flags = sys.argv[1:]
    main = importlib.import_module(module).main
    statuses = []
    for kind, value in [*json.loads(plan), ["end", 0]]:
        statuses.append(run(main, flags, kind, value))
        if statuses[-1] == 0:  # it was done before its turn to be killed came
            break
    print(json.dumps(statuses))
