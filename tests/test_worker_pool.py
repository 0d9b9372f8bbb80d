"""Results in order from worker processes that may die, fail, or be left alone."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest

from data_utils.worker_pool import WorkerDied, count_workers, map_in_order
from tests.conftest import ROOT

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="workers are forked on Linux alone")


def children():
    return [process for process in multiprocessing.active_children() if process.name.startswith("ForkProcess")]


@pytest.mark.parametrize("num_workers", [1, 2, 5])
def test_results_come_in_the_order_of_the_items(num_workers):
    def slow_first(item):
        time.sleep(0.2 if item == 0 else 0)
        return item * item, os.getpid()

    found = list(map_in_order(slow_first, iter(range(20)), num_workers))
    assert [square for square, _ in found] == [item * item for item in range(20)]
    assert os.getpid() not in {pid for _, pid in found}
    assert list(map_in_order(slow_first, iter([]), num_workers)) == [] and not children()


def test_items_are_read_as_they_are_needed():
    read = []

    def items():
        for item in range(100):
            read.append(item)
            yield item

    results = map_in_order(lambda item: item, items(), 2)
    for expected in range(100):
        assert next(results) == expected
        assert len(read) <= expected + 1 + 2 * 2 + 1, "those in flight, and one read ahead"
    results.close()
    assert not children()


def test_results_larger_than_a_pipe_do_not_block():
    large = b"x" * 5_000_000
    assert all(found == large for found in map_in_order(lambda item: item, iter([large] * 6), 2))


def test_a_worker_that_is_killed_is_named_with_its_item():
    def die(item):
        if item == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return item

    with pytest.raises(WorkerDied, match="killed by SIGKILL") as error:
        list(map_in_order(die, iter(range(10)), 2))
    assert error.value.item == 3 and not children()
    with pytest.raises(WorkerDied, match="exit code 7"):
        list(map_in_order(lambda item: os._exit(7), iter(range(10)), 2))


def test_an_error_of_the_function_is_raised_with_the_workers_traceback():
    def fail(item):
        raise KeyError(f"item {item}")

    with pytest.raises(KeyError, match="item 0") as error:
        list(map_in_order(fail, iter([0]), 2))
    assert "in fail" in "".join(error.value.__notes__) and not children()


def test_an_error_while_items_are_read_stops_the_workers():
    def items():
        yield from range(3)
        raise ValueError("unreadable")

    with pytest.raises(ValueError, match="unreadable"):
        list(map_in_order(lambda item: time.sleep(item), items(), 2))
    assert not children()


SCRIPT = """
import time
from data_utils.worker_pool import map_in_order
print("started", flush=True)
for _ in map_in_order(lambda item: time.sleep(60), iter(range(4)), 2):
    pass
"""


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_no_worker_outlives_the_program(sign):
    # A shell's background job ignores SIGINT, nohup SIGHUP, and so would what they start.
    def restore():
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)

    program = subprocess.Popen(
        [sys.executable, "-c", SCRIPT], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        text=True, preexec_fn=restore,
    )  # fmt: skip
    assert program.stdout is not None and program.stdout.readline() == "started\n"
    workers = wait_for_children(program.pid)
    program.send_signal(sign)
    started = time.monotonic()
    program.wait(timeout=20)
    while any(map(is_running, workers)):
        assert time.monotonic() < started + 20
        time.sleep(0.05)


def wait_for_children(pid):
    for _ in range(400):
        with open(f"/proc/{pid}/task/{pid}/children") as file:
            if len(found := [int(each) for each in file.read().split()]) == 2:
                return found
        time.sleep(0.05)
    raise AssertionError("no workers")


def is_running(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_workers_are_counted_by_usable_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(3)))
    assert count_workers() == 3
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(200)))
    assert count_workers() == 16
    monkeypatch.setattr(sys, "platform", "darwin")
    assert count_workers() == 1
