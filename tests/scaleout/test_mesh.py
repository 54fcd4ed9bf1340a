"""Meshes of simulated devices: the tests of the files on_eight_*.py, in processes of their own, since the others have one device."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def on_eight_devices(file: str, *marked: str) -> None:
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
    }
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--durations=10", *marked, str(HERE / file)]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=HERE.parents[1])
    print(run.stdout)
    assert run.returncode == 0, run.stdout + run.stderr


def test_meshes_give_the_answers_of_one_device():
    on_eight_devices("on_eight_devices.py")


@pytest.mark.slow
def test_meshes_give_the_answers_of_one_device_whatever_is_asked_and_packed():
    on_eight_devices("on_eight_devices.py", "-m", "slow")


@pytest.mark.slow
def test_converted_models_answer_on_meshes_as_on_one_device():
    on_eight_devices("on_eight_real.py")
