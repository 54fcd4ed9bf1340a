"""Budgets, machines and models that do not fit are named; machine profiles are measured once."""

import dataclasses
import json
import logging

import numpy as np
import pytest

from jaxinfer import LLM, load_config
from jaxinfer.config import OffloadSettings
from jaxinfer.errors import ConfigError
from jaxinfer.offload import measure
from jaxinfer.offload.budget import ExpertBudget, paper_slots
from jaxinfer.offload.host_experts import LayerExperts
from jaxinfer.offload.offload import Offload
from jaxinfer.offload.pool import link
from jaxinfer.quant.form import quantization
from pallas_kernels.packed_experts import Record

from .engines import MOE, model, store
from .test_placement import MIB, MIXTRAL


def budget(memory, config=MIXTRAL, **settings):
    return ExpertBudget.make(
        config, OffloadSettings(device_memory=memory, **settings), "bfloat16", 10**12, (512, 64), 10**6
    )


def test_what_is_left_is_for_experts():
    memory = 24_576 * MIB
    plan = budget(memory)
    assert plan.total == memory and plan.expert == 336 * MIB
    fixed = plan.shared + plan.activations + plan.state + 3 * plan.expert
    assert plan.left == memory - fixed
    slots = plan.slots(2**30)
    assert fixed + 2**30 + slots * plan.expert <= memory < fixed + 2**30 + (slots + 1) * plan.expert
    assert budget(memory, experts="int4").slots(2**30) > 3.5 * slots
    assert budget(0.5).total == 5 * 10**11
    assert budget(memory, rule="paper").slots(2**30) == paper_slots(MIXTRAL, memory) + 1 == 57


def test_a_budget_too_small_for_the_rest_says_what_is_needed():
    with pytest.raises(
        ConfigError, match=r"'2GiB'.*3211272192 bytes of other parameters.*max_tokens_per_step"
    ):
        budget("2GiB")
    plan = budget("6GiB")
    with pytest.raises(ConfigError, match=r"KV pool takes 6000000000 of .* expert needs 352321536"):
        plan.slots(6 * 10**9)


def test_a_model_without_experts():
    dense = dataclasses.replace(MIXTRAL, moe=None, moe_layers=(False,) * MIXTRAL.layers)
    with pytest.raises(ConfigError, match="has no experts"):
        budget("24GiB", dense)


@pytest.mark.parametrize("mode", ["atom-w4a4", "atom-w4a8", "w8a8"])
def test_quantized_models_whose_experts_are_more_than_4_bit_weights(mode):
    low = dataclasses.replace(MIXTRAL, quantization=quantization(mode, MIXTRAL))
    with pytest.raises(ConfigError, match=rf"quantized \({mode}\).*--quant w4a16.*offload\.experts"):
        budget("24GiB", low)


def test_a_model_of_4_bit_weights():
    low = dataclasses.replace(MIXTRAL, quantization=quantization("w4a16", MIXTRAL))
    plan = budget("24GiB", low)
    assert plan.expert == Record(4096, 14336, "int4").nbytes
    assert plan.shared < 0.5 * budget("24GiB").shared  # but for the vocabulary, these are packed too
    with pytest.raises(ConfigError, match=r"'int8'.*quantized already \(w4a16\).*\"stored\""):
        budget("24GiB", low, experts="int8")


def test_widths_that_records_cannot_have():
    odd = dataclasses.replace(MIXTRAL, moe=dataclasses.replace(MIXTRAL.moe, width=1000))
    with pytest.raises(ConfigError, match=r"cannot be offloaded.*1000"):
        budget("24GiB", odd)


def test_the_library_refuses_before_it_reads(tmp_path):
    with pytest.raises(ConfigError, match=r"offload\.device_memory = '1MiB'"):
        LLM(config=load_config(None, ["offload.device_memory=1MiB", f"offload.folder={tmp_path}"]))
    assert not list(tmp_path.iterdir())


def test_a_host_without_memory_for_the_experts(tmp_path, monkeypatch):
    monkeypatch.setattr("os.sysconf", lambda name: {"SC_PHYS_PAGES": 1, "SC_PAGE_SIZE": 4096}[name])
    with pytest.raises(
        ConfigError, match=r"bytes of experts are on the host, which has 4096 bytes of memory"
    ):
        Offload(store(tmp_path), model(), MOE, OffloadSettings(device_memory="1GiB"), 3)


def test_an_activation_that_the_host_does_not_know(tmp_path):
    relu = dataclasses.replace(MOE, activation="relu")
    with pytest.raises(ConfigError, match=r"the host cannot compute experts here.*relu"):
        Offload(store(tmp_path), model(), relu, OffloadSettings(device_memory="1GiB"), 3)


def test_a_popularity_file_of_another_model(tmp_path):
    path = tmp_path / "popularity.json"
    path.write_text(json.dumps({"counts": np.ones((32, 8)).tolist()}))
    settings = OffloadSettings(device_memory="1GiB", popularity=str(path))
    with pytest.raises(ConfigError, match=r"shape \[32, 8\].*3 rows"):
        Offload(store(tmp_path), model(), MOE, settings, 3)


@pytest.fixture
def profile(tmp_path):
    experts = store(tmp_path)
    records, _ = link(experts.records)
    host = LayerExperts(experts, activation="silu", threads=1)
    folder = tmp_path / "machine"
    yield lambda: measure.machine_profile(experts, records, host, activation="silu", folder=folder, threads=1)
    host.close()


def test_the_machine_is_measured_once(profile, tmp_path, monkeypatch):
    measured = profile()
    costs = measured.costs
    assert (
        0 < costs.link < np.inf and costs.ask == np.inf and costs.host.flat > 0 and costs.device.per_token > 0
    )
    assert costs.host.seconds(np.array([0, 1, 10**6])).tolist() == [
        0, costs.host.flat, costs.host.per_token * 10**6,
    ]  # fmt: skip
    monkeypatch.setattr(measure, "_measure", None)
    assert profile() == measured


@pytest.mark.parametrize(
    "damage, said",
    [
        (lambda data: json.dumps(data | {"machine": "another"}), "of another machine (another)"),
        (lambda data: json.dumps(data | {"link": -1}), "not a machine profile"),
        (lambda data: json.dumps({"machine": 1}), "not a machine profile"),
        (lambda data: "{", "not a machine profile"),
    ],
)
def test_a_profile_of_another_machine_is_measured_again_and_said_once(
    profile, tmp_path, caplog, damage, said
):
    first = profile()
    (path,) = (tmp_path / "machine").iterdir()
    path.write_text(damage(json.loads(path.read_text())))
    with caplog.at_level(logging.WARNING, "jaxinfer"):
        again = profile()
        profile()
    assert [record for record in caplog.messages if said in record] == caplog.messages and len(
        caplog.messages
    ) == 1
    assert again.machine == first.machine == measure.this_machine()
