"""Signals end a run wherever it is, also where Python swallows exceptions."""

import os
import signal
import sys
import time

import pytest

from jaxinfer.batch.interruption import Interrupted, Interruption


class Interrupting:
    """Sends the signal when it is collected: Python swallows what its destructor raises."""

    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)


@pytest.mark.parametrize("shielded", [False, True])
def test_a_signal_in_a_destructor_is_not_lost_and_says_nothing(capsys, shielded):
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM)]
    hook = sys.unraisablehook
    with Interruption() as interruption, pytest.raises(Interrupted), interruption.exposed():
        victim = Interrupting()
        if shielded:
            with interruption.shielded():
                del victim
            pytest.fail("the end of a shield raises what came meanwhile")
        del victim
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            time.sleep(0.01)
    assert capsys.readouterr().err == ""
    assert handlers == [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM)]
    assert sys.unraisablehook is hook


def test_other_exceptions_in_destructors_are_reported(capsys):
    class Faulty:
        def __del__(self):
            raise ValueError("a fault in a destructor")

    hook, sys.unraisablehook = sys.unraisablehook, sys.__unraisablehook__  # pytest has its own
    try:
        with Interruption():
            Faulty()
    finally:
        sys.unraisablehook = hook
    assert "a fault in a destructor" in capsys.readouterr().err
