"""Fingerprints of weights in host memory, beside xxh3 and the speed of memory itself.

    python -m benchmarks.digest [--mb 1 64 512] [--rounds 41] [--threads 1 2]

GB/s, everything in turn in one process: the median and the best of all rounds. Before, it was xxh3
(128 bit) of the same bytes, which one thread reads. `read` sums them up as int64, which is as fast
as torch reads memory. The small tensors are 300 norms of 4 KB: the price of a call.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median

import torch
import xxhash
from torch import Tensor

from flashquant.schemes.fingerprints import definition, quick
from flashquant.update import digests

Work = Callable[[], object]
_SMALL = [(f"norm {place}", torch.full((2048,), float(place)).bfloat16()) for place in range(300)]


def xxh3(tensor: Tensor) -> str:
    state = xxhash.xxh3_128(f"{tuple(tensor.shape)} {tensor.dtype} False ".encode())
    state.update(memoryview(tensor.detach().contiguous().flatten().view(torch.uint8).numpy()))
    return str(state.hexdigest())


def contenders(data: Tensor) -> dict[str, Work]:
    words = data.view(torch.int64)
    return {
        "xxh3": lambda: xxh3(data),
        "sums in C": lambda: quick.sums([data]),
        "definition": lambda: definition.sums(data),
        "read": words.sum,
    }


def small() -> dict[str, Work]:
    return {
        "xxh3, 300 norms": lambda: [xxh3(tensor) for _, tensor in _SMALL],
        "fingerprints, 300 norms": lambda: digests(_SMALL),
    }


def measured(work: dict[str, Work], rounds: int, threads: int) -> dict[str, list[float]]:
    # A single thread's own time, so that whoever else is on the machine does not count.
    clock = time.thread_time if threads == 1 else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for turn in range(rounds):
        for name, call in work.items():
            if name == "definition" and turn % 8:
                continue
            start = clock()
            call()
            seconds[name].append(clock() - start)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--mb", type=int, nargs="+", default=[1, 64, 512])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=41)
    options = parser.parse_args()
    for threads in options.threads:
        torch.set_num_threads(threads)
        for mb in options.mb:
            data = torch.empty(mb << 20, dtype=torch.uint8).random_()
            for name, taken in measured(contenders(data), options.rounds, threads).items():
                typical, best = (data.nbytes / 1e9 / s for s in (median(taken), min(taken)))
                print(
                    f"{threads} threads, {mb:4} MB  {name:12} {typical:6.1f} GB/s, best {best:6.1f}"
                )
        for name, taken in measured(small(), options.rounds, threads).items():
            typical, best = (seconds * 1e3 for seconds in (median(taken), min(taken)))
            print(f"{threads} threads  {name:24} {typical:.2f} ms, best {best:.2f}")


if __name__ == "__main__":
    main()
