"""Work on the bytes of many slices, side by side: numpy, zstd and BLAKE3 let go of the interpreter.

Half of the CPUs that this process may use take part; the others are the engine's, or the trainer's.
"""

import os
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from functools import cache
from typing import TypeVar

_MAX_THREADS = 16
Item = TypeVar("Item")
Result = TypeVar("Result")


def map_slices(function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """What the function gives for each item, in order. Nothing runs any more when this returns.

    Raises:
        Exception: what the function raised for the first item for which it did; items behind it
            may not have been taken then.
    """
    listed = list(items)
    num_threads = min(len(os.sched_getaffinity(0)) // 2, _MAX_THREADS)
    if num_threads < 2 or len(listed) < 2:
        return [function(item) for item in listed]
    futures = [_pool(num_threads).submit(function, item) for item in listed]
    _, waiting = wait(futures, return_when=FIRST_EXCEPTION)
    for future in waiting:
        future.cancel()
    wait(futures)
    for future in futures:
        if not future.cancelled() and (error := future.exception()):
            raise error
    return [future.result() for future in futures]


@cache
def _pool(num_threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(num_threads, "weights")
