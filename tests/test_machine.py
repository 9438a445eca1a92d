"""Threads that work ahead: in order, bounded, and not waited for when nobody wants them any more."""

from __future__ import annotations

import contextlib
import threading
import time

import pytest

from hear_ssam.machine import work_ahead


def test_results_come_in_order_and_with_their_errors() -> None:
    def work(item: int) -> int:
        time.sleep(0.001 * (item % 3))
        return 10 // (item - 5)

    outcomes = list(work_ahead(work, range(9), workers=3, depth=6))
    assert [item for item, _ in outcomes] == list(range(9))
    assert [future.result() for item, future in outcomes if item != 5] == [10 // (i - 5) for i in range(9) if i != 5]
    with pytest.raises(ZeroDivisionError):
        outcomes[5][1].result()


def test_a_bounded_number_is_under_way() -> None:
    under_way, most, lock = 0, 0, threading.Lock()

    def work(item: int) -> None:
        nonlocal under_way, most
        with lock:
            under_way += 1
            most = max(most, under_way)

    for _, future in work_ahead(work, iter(range(50)), workers=2, depth=4):
        future.result()
        with lock:
            under_way -= 1
        time.sleep(0.002)  # a slow reader: the threads could run far ahead
    assert under_way == 0 and 2 <= most <= 4


def test_closing_waits_for_nothing() -> None:
    hold, begun = threading.Event(), []

    def work(item: int) -> None:
        begun.append(item)
        if item:
            hold.wait(30)

    with contextlib.closing(work_ahead(work, range(50), workers=1, depth=4)) as outcomes:
        next(outcomes)[1].result()
    assert len(begun) <= 2  # the closing came back while the second was held
    hold.set()
