"""Requests on disk come back as they were, and the shape of the batch is right."""

import numpy as np
import pytest

from jaxinfer.batch.source import Line
from jaxinfer.batch.spool import Refused, Spool, SpoolError, Ticket, spool_folder
from jaxinfer.core import Request, SamplingParams
from jaxinfer.errors import ConfigError


def fill(spool, rows):
    """Every third row is refused."""
    random = np.random.default_rng(5)
    added = []
    for place in range(rows):
        if place % 3 == 2:
            spool.add_refused(place, "invalid_json", b'{"row": %d}\n' % place)
            added.append(Refused(place, "invalid_json", b'{"row": %d}\n' % place))
            continue
        sampling = SamplingParams(max_tokens=place + 1, stop=("ü",), logit_bias={3: 1.5}, seed=place)
        ids = random.integers(0, 1 << 31, random.integers(1, 50), np.int64).astype(np.int32)
        line = Line("in.jsonl", place + 1, b"", 2)
        ticket = Ticket(bytes([place % 256] * 16), place, "/v1/completions", line, place + 1)
        request = Request(id=f"ä{place}", prompt_ids=ids, sampling=sampling)
        spool.add(request, ticket)
        added.append((request, ticket))
    return added


@pytest.mark.parametrize("rows", [0, 1, 3, 500])
def test_rows_come_back_in_any_order(tmp_path, rows):
    spool = Spool(str(tmp_path))
    added = fill(spool, rows)
    workload = spool.workload()
    assert len(spool) == len(workload.answer_limits) == rows
    for place in np.random.default_rng(1).permutation(rows):
        expected, found = added[place], spool.read(place)
        if isinstance(expected, Refused):
            assert found == expected and len(workload.prompt(place)) == 0
            continue
        request, ticket = found
        assert (request.id, request.sampling, ticket) == (expected[0].id, expected[0].sampling, expected[1])
        np.testing.assert_array_equal(request.prompt_ids, expected[0].prompt_ids)
        np.testing.assert_array_equal(workload.prompt(place), expected[0].prompt_ids)
        assert workload.answer_limits[place] == place + 1
    assert not list(tmp_path.iterdir())
    spool.close()


def test_sampling_that_many_rows_share_comes_back_beside_that_of_one_row(tmp_path):
    """More than any number of objects that are told apart; made anew and let go, so that identities come again."""
    spool, shared = Spool(str(tmp_path)), SamplingParams(temperature=0.5)
    ticket = Ticket(bytes(16), 0, "/v1/completions", Line("in.jsonl", 1, b"", 0), 1)
    ids = np.ones(1, np.int32)
    for place in range(5000):
        sampling = shared if place % 2 else SamplingParams(seed=place)
        spool.add(Request(id=str(place), prompt_ids=ids, sampling=sampling), ticket)
    spool.workload()
    for place in range(5000):
        expected = shared if place % 2 else SamplingParams(seed=place)
        assert spool.read(place)[0].sampling == expected
    spool.close()


def test_a_full_disk_and_a_missing_folder_are_named(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"batch.spool = .*nowhere.*No such file"):
        Spool(str(tmp_path / "nowhere"))
    monkeypatch.setattr("tempfile.TemporaryFile", lambda **_: open("/dev/full", "r+b"))  # noqa: SIM115
    spool = Spool(str(tmp_path))
    with pytest.raises(SpoolError, match=r"No space left.*batch.spool"):
        spool.add_refused(0, "code", b"line")
        spool.workload()
    spool.close()


def test_it_lies_beside_an_output_that_is_a_file(tmp_path):
    assert spool_folder(str(tmp_path / "out.jsonl")) == str(tmp_path)
    assert spool_folder("-") is None and spool_folder("/dev/null") is None
