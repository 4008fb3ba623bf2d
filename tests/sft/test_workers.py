"""Work in other processes: in its order, bounded, and gone when it should be."""

import multiprocessing
import os
import signal
import threading
import time
from contextlib import closing

import pytest

from sft_kernels.sft import workers
from sft_kernels.sft.workers import Died, OutOfTime, Workers, limited


def double(item):
    time.sleep(0.02 * (item % 3))  # so that later ones are done first
    return 2 * item, os.getpid()


def test_results_come_in_order_from_all_processes_and_few_items_are_taken_ahead():
    taken = []

    def items():
        for i in range(20):
            taken.append(i)
            yield i

    with Workers(double, 3) as pool, closing(pool.map(items())) as results:
        found = [next(results)]
        assert len(taken) <= 8
        found += results
    assert [(item, twice) for item, (twice, _) in found] == [(i, 2 * i) for i in range(20)]
    processes = {process for _, (_, process) in found}
    assert len(processes) == 3
    assert os.getpid() not in processes
    assert not [process for process in processes if os.path.exists(f"/proc/{process}")]


def test_without_processes_the_work_is_done_here(monkeypatch):
    monkeypatch.setattr(workers.sys, "platform", "darwin")
    with Workers(double, 3) as pool:
        assert [*pool.map([1, 2])] == [(1, (2, os.getpid())), (2, (4, os.getpid()))]


def test_a_thread_beside_the_main_one_does_the_work_itself():
    found = []

    def work():
        with Workers(double, 3) as pool:
            found.extend(pool.map([1, 2]))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [(1, (2, os.getpid())), (2, (4, os.getpid()))]


def test_a_process_that_does_not_begin_is_given_up(monkeypatch):
    monkeypatch.setattr(workers, "_BEGINNING", 0.2)
    monkeypatch.setattr(workers, "_bound_memory", lambda: time.sleep(60))
    with Workers(double, 2) as pool:
        assert [*pool.map([1])] == [(1, (2, os.getpid()))]


def fails(item):
    if item == 2:
        raise KeyError("the reason")
    return item


def test_an_error_there_is_an_error_here():
    with Workers(fails, 2) as pool, pytest.raises(RuntimeError, match="KeyError: 'the reason'"):
        list(pool.map(range(5)))


def killed(item):
    if item == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return item


def test_a_process_that_dies_is_told():
    with Workers(killed, 2) as pool:
        found = dict(pool.map(range(2)))
    assert found[0] == 0
    assert isinstance(found[1], Died)
    assert "SIGKILL" in str(found[1])


def endless(item):
    if item == "deaf":  # as code that does not come back to the interpreter
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGVTALRM])
    try:
        with limited():
            while True:
                pass
    except OutOfTime:
        return "out of time"


def greedy(item):
    try:
        return len(bytearray(item))
    except MemoryError:
        return "out of memory"


def test_time_and_memory_are_bounded(monkeypatch):
    monkeypatch.setattr(workers, "SECONDS", 0.3)
    with Workers(endless, 1) as pool:
        (_, first), (_, second) = pool.map(["", "deaf"])
    assert first == "out of time"
    assert str(second) == "it did not end within 0.6 s of computing"
    monkeypatch.setattr(workers, "MEMORY", 1 << 28)
    with Workers(greedy, 1) as pool:
        assert [found for _, found in pool.map([1 << 27, 1 << 29, 1])] == [1 << 27, "out of memory", 1]
    with limited():  # here nothing is limited
        assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0)


def sleeps(item):
    time.sleep(60)


def test_an_interrupt_does_not_wait_for_the_work():
    started = time.monotonic()

    def interrupted():
        yield from range(2)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), Workers(sleeps, 2) as pool, closing(pool.map(interrupted())) as results:
        list(results)
    assert time.monotonic() - started < 10


def test_a_daemon_which_may_have_no_processes_does_the_work_itself(monkeypatch):
    monkeypatch.setitem(multiprocessing.current_process()._config, "daemon", True)
    with Workers(double, 3) as pool:
        assert [*pool.map([1, 2])] == [(1, (2, os.getpid())), (2, (4, os.getpid()))]


@pytest.mark.parametrize("allowed", [0, 1])
def test_fewer_processes_will_do_and_none_is_an_error(allowed, monkeypatch):
    fork, left = os.fork, [None] * allowed

    def limited_fork():
        if not left:
            raise BlockingIOError(11, "Resource temporarily unavailable")
        left.pop()
        return fork()

    monkeypatch.setattr(os, "fork", limited_fork)
    if not allowed:
        with pytest.raises(ValueError, match=r"no process could be started .*unavailable\); see ulimit -u"):
            Workers(double, 3)
        return
    with Workers(double, 3) as pool:
        assert [twice for _, (twice, _) in pool.map(range(5))] == [0, 2, 4, 6, 8]


def test_it_works_if_sigchld_is_ignored():
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        with Workers(double, 2) as pool:
            assert [twice for _, (twice, _) in pool.map(range(5))] == [0, 2, 4, 6, 8]
    finally:
        signal.signal(signal.SIGCHLD, before)


def test_an_interrupt_does_not_wait_for_the_last_item():
    def interrupt(*args):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    start = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt), Workers(sleeps, 1) as pool:
            list(pool.map([1]))
    finally:
        signal.signal(signal.SIGALRM, before)
    assert time.monotonic() - start < 10
