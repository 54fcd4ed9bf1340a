"""A driver plans a batch of a million rows in bounded memory."""

import pytest

from bench.batch_stub import Stub, most_resident, write_input
from jaxinfer.batch.interruption import Interruption
from jaxinfer.batch.journal import OutputFile
from jaxinfer.batch.runner import BatchRun
from jaxinfer.batch.source import Source
from jaxinfer.batch.tally import Tally
from jaxinfer.config import load_config
from jaxinfer.scaleout.fleet import Fleet
from jaxinfer.scaleout.ray import planned
from jaxinfer.scaleout.seat import Seat
from jaxinfer.schedule.cost import Cost


class Idle(Stub):
    """A fleet of 64 workers of which none is ever started; it plans as a real one."""

    _settings = planned(load_config())
    _seats = tuple(Seat(number) for number in range(64))
    _cost = Cost.paper(parameters=8e9, kv_width=1024, layers=32, flops=2e14, bandwidth=1.7e12)
    blend = Fleet.blend


class Planned(BatchRun):
    @property
    def fleet_plan(self):
        return self._blend


@pytest.mark.slow
def test_a_million_rows_are_read_tokenized_and_planned_in_less_than_4_gib(tmp_path):
    rows = 1_000_000
    source, out = tmp_path / "in.jsonl", str(tmp_path / "out.jsonl")
    write_input(source, "text", rows)
    file = OutputFile(out, overwrite=False)
    run = Planned(
        Idle(rows),
        Source([str(source)], max_line_bytes=2**20),
        Idle._settings,
        tally=Tally(),
        interruption=Interruption(),
        ignored=lambda name: None,
        spool=str(tmp_path),
    )
    run.survey(file.kept, out)
    file.close()
    assert run.fleet_plan.count == run.fleet_plan.dispatcher.left == rows
    assert most_resident() < 4 * 2**30
