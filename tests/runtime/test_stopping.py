from __future__ import annotations

import os
import signal
import threading
import time

import pytest

from raydist.runtime.stopping import StopSignals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_asks_and_the_second_one_ends(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with StopSignals(grace_s=3600) as signals:
        assert signals.reason is None
        os.kill(os.getpid(), number)
        assert signals.reason == number.name
        signals.raise_if_overdue()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
    assert signal.getsignal(number) is before


def test_the_grace_ends() -> None:
    with StopSignals(grace_s=0.01) as signals:
        signals.raise_if_overdue()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.05)
        with pytest.raises(KeyboardInterrupt):
            signals.raise_if_overdue()


def test_outside_of_the_main_thread_signals_are_left_alone() -> None:
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def enter() -> None:
        with StopSignals(grace_s=1):
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [before]
