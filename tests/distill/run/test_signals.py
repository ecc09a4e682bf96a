"""Signals end a run after its current iteration; a second one has its former effect."""

import os
import signal

import pytest

from distill.run.signals import stop_signal


def test_a_second_signal_is_not_swallowed() -> None:
    # A shell starts its background jobs with SIGINT ignored, and these tests may be one.
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with stop_signal() as received:
            os.kill(os.getpid(), signal.SIGINT)
            assert received == [signal.SIGINT]
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, inherited)
