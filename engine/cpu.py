"""How a run computes on CPU: with how many threads, and with which library's products."""

import functools
import os
import platform
import re
import statistics
import time
import timeit

PROBE_NUMBERS, PROBE_SECONDS, PROBES = 2**17, 0.02, 6  # see choose_threads
SLOW, STUCK = 0.65, 0.25  # .9 on a quiet machine, .4 and .003 beside a busy process
SLOW_BFLOAT16, FAST_BFLOAT16 = 3, 1 / 4  # times float32; .15 with units for it, 35 without any
LARGEST_PRODUCT_ERROR = 1e-5  # float32 is at 1e-6, bfloat16 at 1e-3


def choose_threads(recorded: int | None = None) -> None:
    """Set the number of CPU threads: `recorded`, or as many as have a free core each.

    A parallel region waits for its slowest thread. Beside another busy process that thread may be
    off its core for milliseconds, and fewer threads are many times faster. So parallel regions with
    equal work per thread are timed here. The number is halved while the regions are slower than
    with half the threads: in the median, or by far in at least two trials. A thread count set by
    OMP_NUM_THREADS is not changed.
    """
    import torch

    if "OMP_NUM_THREADS" in os.environ:
        return
    all_threads = threads = _default_threads()
    if recorded is not None:
        threads = min(recorded, all_threads)
    else:
        while threads > 1 and _waits(_rates(threads), _rates(threads // 2)):
            threads //= 2
    torch.set_num_threads(threads)
    if threads < all_threads:
        reason = "as this run began" if recorded else "other processes are at work here"
        print(f"{threads} of {all_threads} threads: {reason}; OMP_NUM_THREADS sets it")


@functools.cache
def _default_threads() -> int:
    """The number before any choice in this process."""
    import torch

    return torch.get_num_threads()


def _waits(rates: list[float], half: list[float]) -> bool:
    """Whether parallel regions are slow, compared with regions of half the threads."""
    expected = statistics.median(half)
    slow = statistics.median(rates) < SLOW * expected
    return slow or sorted(rates)[1] < STUCK * expected


def _rates(threads: int) -> list[float]:
    """Parallel regions per second with equal work per thread, measured PROBES times."""
    import torch

    torch.set_num_threads(threads)
    numbers, rates = torch.zeros(PROBE_NUMBERS * threads), []
    for _ in range(PROBES):
        numbers.add_(1)
        started, done = time.perf_counter(), 0
        while time.perf_counter() - started < PROBE_SECONDS:
            numbers.add_(1)
            done += 1
        rates.append(done / (time.perf_counter() - started))
    return rates


def choose_products() -> None:
    """On AMD CPUs, compute float32 matrix products with oneDNN instead of the slower MKL.

    MKL uses half the width of their vectors. torch hands float32 products to oneDNN at precision
    `medium` only, which permits bfloat16 on a CPU with units for it. So the error of a
    trial product is measured, and the precision is reset if it exceeds that of float32.
    """
    import torch

    if "AuthenticAMD" not in _about() or torch.get_float32_matmul_precision() != "highest":
        return
    torch.set_float32_matmul_precision("medium")
    if _product_error() > LARGEST_PRODUCT_ERROR:
        torch.set_float32_matmul_precision("highest")


def report_bfloat16(used: bool, compiles: bool) -> None:
    """Say where bfloat16 products are much slower, or faster, than float32 ones.

    Args:
        used: whether the run computes in bfloat16.
        compiles: whether it has a flag --compile.
    """
    ratio = _seconds_of_product("bfloat16") / _seconds_of_product("float32")
    if used and ratio > SLOW_BFLOAT16:
        print(f"bf16 products are {ratio:.0f} times slower than float32 here; leave --bf16 out")
    if not used and ratio < FAST_BFLOAT16:
        flags = "--bf16 true --compile true" if compiles else "--bf16 true"
        print(f"bf16 products are {1 / ratio:.0f} times faster than float32 here: {flags}")


def _seconds_of_product(dtype: str) -> float:
    """The best of five, 512 x 512 x 512."""
    import torch

    x = torch.ones(512, 512, dtype=getattr(torch, dtype))
    return min(timeit.repeat(lambda: x @ x, number=1, repeat=5))


@functools.cache
def _about() -> str:
    """What Linux says of the first core; empty elsewhere."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            return file.read(2000)
    except OSError:
        return ""


def name() -> str:
    """The processor and its cores."""
    found = re.search(r"model name\s*:\s*(.+)", _about())
    return f"{found[1] if found else platform.processor()}, {os.cpu_count()} cores"


def _product_error() -> float:
    """Largest error of float32 products on CPU, over the largest result, in the layouts of a step:
    forward, gradient to the input, gradient to the weights.
    """
    import torch

    draws = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(size, 256, generator=draws) for size in (512, 384))
    slope, largest = torch.randn(512, 384, generator=draws), 0.0
    for a, b in ((x, weight.T), (slope, weight), (slope.T, x)):
        exact = a.double() @ b.double()
        error = ((a @ b).double() - exact).abs().max() / exact.abs().max()
        largest = max(largest, float(error))
    return largest
