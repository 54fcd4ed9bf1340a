"""What workers take of a cluster, and that what they are sent can be sent."""

import dataclasses
import pickle
import re
import socket
import threading

import pytest

from jaxinfer import LLM, load_config
from jaxinfer.config import MeshShape
from jaxinfer.errors import ConfigError
from jaxinfer.scaleout.cluster import join, resources


class Nodes:
    """A cluster of machines with so many CPUs and GPUs."""

    def __init__(self, *machines):
        self._machines = machines

    def nodes(self):
        return [{"Alive": True, "Resources": {"CPU": cpus, "GPU": gpus}} for cpus, gpus in self._machines]


@pytest.mark.parametrize(
    ("overrides", "machines", "workers", "gpus"),
    [
        ([], [(8, 8), (8, 8)], 16, 1),
        (["engine.mesh={tensor=4}"], [(8, 8), (8, 8)], 4, 4),
        (["engine.mesh={tensor=2, expert=4}"], [(8, 8), (8, 4)], 1, 8),
        (["engine.mesh={tensor=4}", "scaleout.gpus=2"], [(8, 8)], 4, 2),
        (["engine.mesh={tensor=4}"], [(8, 0), (8, 0)], 2, 0),
    ],
)
def test_a_worker_takes_a_gpu_for_each_device_of_its_mesh(overrides, machines, workers, gpus):
    found = resources(Nodes(*machines), load_config(None, overrides))
    assert found == (workers, {"num_cpus": 1.0, "num_gpus": gpus})


def test_a_mesh_larger_than_any_machine_is_refused():
    settings = load_config(None, ["engine.mesh={tensor=4}"])
    with pytest.raises(ConfigError, match=r"room for 0 workers of 1 CPU, 4 GPU each; .*engine\.mesh"):
        resources(Nodes((8, 2), (8, 2)), settings)


def test_settings_and_limits_of_a_mesh_travel_to_workers_and_back():
    settings = load_config(None, ["engine.mesh={tensor=1}", "engine.max_seqs=2", "cache.pages=20"])
    engine = LLM(config=settings).engine
    for sent in (settings, engine.limits):
        assert pickle.loads(pickle.dumps(sent)) == sent
    wide = dataclasses.replace(settings.engine, mesh=MeshShape(tensor=4, expert=2))
    assert pickle.loads(pickle.dumps(dataclasses.replace(settings, engine=wide))).engine.mesh.expert == 2


@pytest.mark.parametrize(
    "address",
    ["host:port", ":6379", "::", "127.0.0.1:-5", "127.0.0.1:\u00b2", "127.0.0.1:1", "127.0.0.1:99999999"]
    + ["ray://", "ray://127.0.0.1:1", "[::1]:1", "a..b:6379", "x" * 70 + ":6379", " "],
)
def test_addresses_that_nobody_can_have_or_has_are_refused(address):
    with pytest.raises(ConfigError, match=f"--ray {re.escape(address)}: (expected|no Ray cluster)"):
        join(address)


@pytest.mark.parametrize("says", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b""])
def test_what_answers_and_is_no_ray_cluster_is_refused_at_once(says):
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer():
            link, _ = server.accept()
            link.sendall(says)
            link.close()

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(ConfigError, match="no Ray cluster"):
            join(f"127.0.0.1:{server.getsockname()[1]}")
        thread.join()
