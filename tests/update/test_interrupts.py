"""Signals wait until the block is done, and are not lost."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from flashquant.update.interrupts import uninterrupted


def test_ctrl_c_waits_for_the_end_of_the_block():
    done = []

    def block():
        with uninterrupted():
            os.kill(os.getpid(), signal.SIGINT)
            done.append("the rest")

    with pytest.raises(KeyboardInterrupt):
        block()

    assert done == ["the rest"]


def test_a_signal_is_held_back_through_blocks_inside_blocks():
    done = []

    def block():
        with uninterrupted():
            with uninterrupted():
                os.kill(os.getpid(), signal.SIGINT)
            done.append("the rest")

    with pytest.raises(KeyboardInterrupt):
        block()

    assert done == ["the rest"]


def test_handlers_are_put_back():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)

    with pytest.raises(ValueError, match="inside"), uninterrupted():
        raise ValueError("inside")

    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGALRM, signal.SIGHUP])
def test_the_handler_of_another_signal_is_called_afterwards(number):
    """Of an alarm, too: judges of answers set one, and raise when it rings."""
    order = []
    before = signal.signal(number, lambda *_: order.append("handler"))
    try:
        with uninterrupted():
            os.kill(os.getpid(), number)
            order.append("block")
    finally:
        signal.signal(number, before)

    assert order == ["block", "handler"]


def test_in_other_threads_nothing_is_touched():
    handlers = []

    def look():
        with uninterrupted():
            handlers.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()

    assert handlers == [signal.getsignal(signal.SIGINT)]
