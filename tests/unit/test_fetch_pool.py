"""Read-ahead windows, and the threads that fetch."""

from __future__ import annotations

import threading
from collections.abc import Callable

from shim.cache.pool import Workers
from shim.cache.readahead import Readahead
from tests.support.fetchbench import make

__all__ = ["make"]


def test_readahead_windows_double_up_to_the_limit() -> None:
    ahead = Readahead(1000, 8)
    assert list(ahead.seen(4, 4)) == []
    assert list(ahead.seen(4, 4)) == []
    assert list(ahead.seen(5, 5)) == []
    assert list(ahead.seen(6, 6)) == [7]
    assert list(ahead.seen(7, 7)) == [8, 9]
    assert list(ahead.seen(8, 8)) == [10, 11, 12, 13]
    assert list(ahead.seen(10, 10)) == [14, 15, 16, 17]
    assert list(ahead.seen(14, 15)) == [18, 19, 20, 21]
    assert list(ahead.seen(500, 500)) == []
    assert list(ahead.seen(998, 999)) == []
    assert list(ahead.seen(18, 18)) == [22, 23, 24, 25]  # other readers in between do no harm
    assert list(Readahead(10, 0).seen(1, 2)) == []
    off = Readahead(10, 0)
    assert [list(off.seen(run, run)) for run in range(4)] == [[]] * 4


def test_a_reader_of_another_layer_is_never_kept_waiting_by_a_stalled_one() -> None:
    pool = Workers(2, extra=4)
    gate, ran = threading.Event(), threading.Event()
    for _ in range(10):
        pool.submit("stalled", lambda: gate.wait(20) and None)
    pool.submit("other", ran.set)
    assert ran.wait(5)
    gate.set()
    pool.close()


def test_jobs_that_come_together_all_get_threads() -> None:
    """Also when there is an idle thread that each of them might count on."""
    for _ in range(50):
        pool = Workers(4, extra=0)
        warm = threading.Event()
        pool.submit("layer", warm.set)
        assert warm.wait(5)
        together = threading.Barrier(4)
        passed = threading.Semaphore(0)
        for _ in range(4):
            pool.submit("layer", lambda b=together, p=passed: b.wait(5) >= 0 and p.release())  # type: ignore[misc]
        for _ in range(4):
            assert passed.acquire(timeout=5)
        pool.close()


def test_the_pool_keeps_its_number_and_puts_waiting_readers_first() -> None:
    pool = Workers(2, extra=0)
    gate, order, running, most = threading.Event(), [], [0], [0]
    lock, done = threading.Lock(), threading.Semaphore(0)

    def job(name: str) -> Callable[[], None]:
        def run() -> None:
            with lock:
                running[0] += 1
                most[0] = max(most[0], running[0])
                order.append(name)
            gate.wait(20)
            with lock:
                running[0] -= 1
            done.release()

        return run

    names = ["first", "second", "ahead", "urgent"]
    for name in names:
        pool.submit("layer", job(name), urgent=name != "ahead")
    gate.set()
    for _ in names:
        assert done.acquire(timeout=10)
    assert most[0] <= 2
    assert order.index("urgent") < order.index("ahead")
    pool.close()
    assert not pool.submit("layer", gate.set)
