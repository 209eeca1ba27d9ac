"""Independent fits side by side."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from recast.passes.progress import track
from recast.patterns.errors import PlanError

__all__ = ["check_jobs", "mapped"]

T = TypeVar("T")
R = TypeVar("R")


def check_jobs(jobs: int | None) -> None:
    """Raise PlanError unless `jobs` is None or a positive number."""
    if jobs is not None and (isinstance(jobs, bool) or not isinstance(jobs, int) or jobs < 1):
        raise PlanError(f"jobs: {jobs!r} cannot work; a whole number, 1 or more, would, such as the number of cores")


def mapped(
    function: Callable[[T], R], items: Sequence[T], *, jobs: int | None, label: str, progress: bool | None = None
) -> list[R]:
    """Apply a function to every item.

    Parameters
    ----------
    function
        May fail; the first failure in the order of the items is raised, and what has not begun is left undone. An
        interruption (Ctrl-C) ends those that run, too.
    items
        Independent of each other.
    jobs
        None for one after another, each on all cores. A number for so many at a time, each on one core: for many small
        weights that is faster, and results do not depend on the number, since sums are not split between cores.
    label, progress
        Of the progress bar.

    Examples
    --------
    >>> mapped(abs, [-2, 3], jobs=2, label="sizes", progress=False)
    [2, 3]
    """
    check_jobs(jobs)
    if jobs is None:
        return [function(item) for item in track(items, label, progress)]
    threads = torch.get_num_threads()
    running: set[int] = set()

    def alone(item: T) -> R:
        own = threading.get_ident()
        running.add(own)
        try:
            with torch.no_grad():
                return function(item)
        finally:
            running.discard(own)

    pool = ThreadPoolExecutor(jobs, thread_name_prefix="recast-fit", initializer=torch.set_num_threads, initargs=(1,))
    try:
        waiting = [pool.submit(alone, item) for item in items]
        return [future.result() for future in track(waiting, label, progress)]
    except (KeyboardInterrupt, SystemExit):
        pool.shutdown(wait=False, cancel_futures=True)
        _stop(running)
        raise
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)  # what threads begin with is set for all


class _Stopped(BaseException):
    """Raised within a fit whose result nobody waits for any more."""


def _stop(running: set[int]) -> None:
    """End what threads compute, each at its next step in Python: an interruption reaches the main thread alone."""
    for thread in list(running):
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(_Stopped))
