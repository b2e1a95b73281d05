"""Processes: how a command ends, the processes of one torchrun, and signals.

Each process of one run works on a part of the same global batch. With one process every exchange
here is the identity. Gradients are summed once per optimizer step over all processes, after they
have been accumulated, so that a step is the same mathematics whatever the number of processes.
"""

import datetime
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from engine import cpu
from engine.errors import RunError, Stopped, UsageError, one_line

if TYPE_CHECKING:
    import torch

LONGEST_WAIT = datetime.timedelta(hours=6)  # while the first process fills the teacher's cache
PEER_GONE = ("connection closed", "connection reset", "remote process exited", "closed by peer")
FIRST_REPORTS = 30  # seconds that the other processes wait while the first reports a UsageError


# -- the processes of one run -------------------------------------------------------------------


def world() -> int:
    """The number of processes."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def is_first() -> bool:
    """Whether this process writes the files and prints."""
    return rank() == 0


def start(device_type: str) -> None:
    """Join the other processes: gloo on CPU, nccl on CUDA."""
    import torch.distributed as dist

    if world() > 1 and not dist.is_initialized():
        backend = "gloo" if device_type == "cpu" else "nccl"
        dist.init_process_group(backend, timeout=LONGEST_WAIT)


def choose_device(device: str, threads: int | None = None) -> "torch.device":
    """The device of this process; several processes are joined here, each with a CUDA device of its
    own.

    Args:
        device: auto (CUDA where there is one), cpu or cuda.
        threads: on CPU, how many threads compute; see engine.cpu.
    Raises:
        UsageError: CUDA is asked for and there is none, or there are fewer devices than processes.
    """
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device=cuda: torch finds no CUDA device here; use --device=cpu")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        processes, devices = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
        if processes > devices:
            raise UsageError(
                f"--nproc_per_node={processes}: one CUDA device per process, there are {devices}"
            )
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    else:
        cpu.choose_threads(threads)
        cpu.choose_products()
    start(device)
    if device == "cuda" and world() > 1:
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device(device)


def device_name(device: "torch.device") -> str:
    """The GPU, or the processor and its cores."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return cpu.name()


def barrier() -> None:
    """Wait until every process is here."""
    gather(None)


def gather(value: Any) -> list[Any]:
    """Every process's value, by rank."""
    if world() == 1:
        return [value]
    import torch.distributed as dist

    values = [None] * world()
    dist.all_gather_object(values, value)
    return values


def sum_in_place(tensors: list["torch.Tensor"]) -> None:
    """Replace each tensor by its sum over the processes. All processes give the same shapes."""
    if world() == 1:
        return
    import torch.distributed as dist

    for tensor in tensors:
        dist.all_reduce(tensor)


# -- signals ------------------------------------------------------------------------------------


class Signals:
    """Context manager that records the first SIGTERM or SIGINT; a second one ends the process.

    received: the number of the signal that came, 0 for none.
    """

    received = 0

    def __enter__(self) -> "Signals":
        heard = (signal.SIGTERM, signal.SIGINT)
        heard = heard if threading.current_thread() is threading.main_thread() else ()
        self.previous = {number: signal.signal(number, self._note) for number in heard}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, _) -> None:
        if self.received:
            os._exit(128 + number)
        self.received = number
        name = signal.Signals(number).name
        line = f"\n{name}: finishing this step and saving; a second signal ends the run at once\n"
        os.write(2, line.encode())


# -- how a command ends -------------------------------------------------------------------------


def quiet_all_but_first() -> None:
    """Only the first process prints and shows progress bars."""
    if not is_first():
        os.environ["TQDM_DISABLE"] = "1"
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  until the end


def call(command: Callable[[], Any]) -> None:
    """Run a command and turn expected errors into one line on stderr and an exit status.

    2: a wrong request. 1: a failure, a full disk, out of memory. 128 + number: a signal. 141: a
        closed pipe.
    """
    try:
        command()
    except UsageError as error:
        if is_first():
            _end(2, f"error: {error}")
        # Every process meets the same error, and torchrun ends the rest as soon as one ends.
        time.sleep(FIRST_REPORTS)
        _end(2, f"error: {_process()}{error}")
    except RunError as error:
        _end(1, f"error: {_process()}{error}")
    except Stopped as stop:
        _end(128 + stop.number, f"stopped: {stop}" if is_first() else "")
    except (MemoryError, RuntimeError) as error:
        if not _out_of_memory(error):
            if world() > 1 and any(words in str(error).lower() for words in PEER_GONE):
                _end(1, f"error: {_process()}another process ended ({one_line(error, 120)})")
            raise
        reason = str(error).splitlines()[0][:160] if str(error) else "MemoryError"
        _end(
            1,
            f"error: {_process()}out of memory ({reason}); lower --micro_batch_size or"
            " --eval_batch_size and run the command again",
        )
    except KeyboardInterrupt:
        _end(130, "interrupted")
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:  # a full disk, a folder that went away
        path = f": {error.filename}" if error.filename else ""
        _end(1, f"error: {error.strerror or error}{path}")
    if world() > 1:
        _end(0, "")


def _end(status: int, line: str) -> None:
    if line:
        print(line, file=sys.stderr)
    if world() > 1:
        # gloo's thread frees the last exchange after the main thread has its result. If the
        # interpreter is closing by then, it aborts the process after all work is done.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def _process() -> str:
    return f"process {rank()}: " if world() > 1 else ""


def _out_of_memory(error: Exception) -> bool:
    """Python's error, CUDA's, or the CPU allocator's, which is a plain RuntimeError."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return "can't allocate memory" in str(error)
