"""Fits side by side: the same bits for any number of jobs, and going on after an interrupt."""

import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import recast
from recast.passes.cache import OperatorCache
from recast.passes.forms import Form
from recast.passes.parallel import mapped
from recast.patterns.errors import PlanError

RECIPE = {
    "default": "int4(group=16, rounding='gptq') + low_rank(3)",
    "rules": [
        {"match": "[0-2]", "form": "shared_basis(7, group=3)"},
        {"match": "[3-4]", "form": "low_rank(0.5) | int8"},
    ],
}


@pytest.fixture(scope="module")
def program() -> recast.Program:
    torch.manual_seed(0)
    return recast.capture(nn.Sequential(*(nn.Linear(60, 60) for _ in range(8))).eval(), (torch.randn(3, 60),))


@pytest.fixture(scope="module")
def calibration(program: recast.Program) -> recast.Calibration:
    return recast.calibrate(program, [(torch.randn(400, 60),)])


def test_any_number_of_jobs_gives_the_same_bits(program: recast.Program, calibration: recast.Calibration) -> None:
    found = []
    threads = torch.get_num_threads()
    for jobs in (1, 2, 5):
        cache = OperatorCache(None)
        plan = recast.plan(program, RECIPE, calibration, cache=cache, jobs=jobs)
        rewritten = recast.rewrite(program, plan, cache=cache, jobs=jobs)
        found.append((str(plan), {n: b.clone() for n, b in rewritten.module.named_buffers()}))
    assert torch.get_num_threads() == threads
    (first_plan, first), *others = found
    assert len(first) > 20
    for text, buffers in others:
        assert text == first_plan
        assert buffers.keys() == first.keys()
        assert all(torch.equal(buffers[name], first[name]) for name in first)


def test_a_loaded_plan_is_fitted_by_jobs_too(program: recast.Program, calibration: recast.Calibration) -> None:
    plan = recast.plan(program, RECIPE, calibration, cache=OperatorCache(None), jobs=2)
    cache = OperatorCache(None)
    recast.rewrite(program, plan, cache=cache, jobs=2)
    assert cache.fits == 8


def test_interrupted_fitting_goes_on_where_it_stopped(
    program: recast.Program, calibration: recast.Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = 0
    plain = Form.fit_together
    lock = threading.Lock()

    def interrupted(*args: object, **kwargs: object) -> object:
        nonlocal begun
        with lock:
            begun += 1
            if begun == 4:
                raise KeyboardInterrupt
        return plain(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(Form, "fit_together", interrupted)
    with pytest.raises(KeyboardInterrupt):
        recast.plan(program, "low_rank(0.5)", calibration, cache=OperatorCache(tmp_path), jobs=1)
    monkeypatch.undo()
    cache = OperatorCache(tmp_path)
    recast.plan(program, "low_rank(0.5)", calibration, cache=cache, jobs=2)
    assert cache.hits >= 3  # (one more may have been under way)
    assert cache.fits == 8 - cache.hits > 0
    assert not list(tmp_path.rglob("*.tmp"))


def test_the_first_failure_in_order_is_raised_and_the_rest_left_undone() -> None:
    done = []

    def work(item: int) -> int:
        if item in (2, 3):
            raise ValueError(f"item {item}")
        done.append(item)
        return item

    with pytest.raises(ValueError, match="item 2"):
        mapped(work, range(50), jobs=1, label="work", progress=False)
    assert set(done) < set(range(50))
    with pytest.raises(PlanError, match="0 cannot work"):
        mapped(work, [0], jobs=0, label="work", progress=False)


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C as Python begins with it, whatever others in this process made of it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_interruption_ends_what_runs(interruptible: None) -> None:
    begun, whole = threading.Barrier(3), []

    def slow(item: int) -> None:
        begun.wait(timeout=30)
        for _ in range(3000):
            time.sleep(0.01)
        whole.append(item)

    def interrupt() -> None:
        begun.wait(timeout=30)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        mapped(slow, [0, 1, 2], jobs=2, label="fitting", progress=False)
    assert whole == []


def test_jobs_are_checked_before_any_work(program: recast.Program) -> None:
    with pytest.raises(PlanError, match="-1 cannot work"):
        recast.plan(program, "int8", jobs=-1)
    with pytest.raises(PlanError, match="0 cannot work"):
        recast.rewrite(program, recast.plan(program, "int8"), jobs=0)
