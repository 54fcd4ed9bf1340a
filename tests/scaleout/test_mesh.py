"""Meshes of simulated devices: the tests of `on_eight_devices.py`, in a process of their own, since the others have one device."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FILE = Path(__file__).with_name("on_eight_devices.py")


def on_eight_devices(*marked: str) -> None:
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
    }
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--durations=10", *marked, str(FILE)]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=FILE.parents[2])
    print(run.stdout)
    assert run.returncode == 0, run.stdout + run.stderr


def test_meshes_give_the_answers_of_one_device():
    on_eight_devices()


@pytest.mark.slow
def test_meshes_give_the_answers_of_one_device_for_every_kind_of_model():
    on_eight_devices("-m", "slow")
