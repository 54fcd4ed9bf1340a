"""Digest sets against Python's own; reordering against sorting."""

import random
import resource

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxinfer.batch.identity import DigestSet, digest, run_fingerprint
from jaxinfer.batch.reorder import InputOrder


@given(st.lists(st.integers(0, 300)))
def test_digest_set_is_a_set(numbers):
    ours, theirs = DigestSet(), set()
    for number in numbers:
        key = digest(b"%d" % number)
        assert (key in ours) == (key in theirs)
        assert ours.add(key) == (key not in theirs)
        theirs.add(key)
        assert len(ours) == len(theirs)


def test_digest_set_survives_growth_and_stays_small():
    ours = DigestSet()
    for number in range(30_000):
        assert ours.add(digest(b"%d" % number))
    assert all(digest(b"%d" % number) in ours for number in range(30_000))
    assert not any(digest(b"%d" % number) in ours for number in range(30_000, 40_000))
    assert len(ours._table) <= 48 * 30_000


def test_digests_tell_parts_apart():
    assert digest(b"ab", b"c") != digest(b"a", b"bc") != digest(b"abc")
    assert run_fingerprint("a", "b") != run_fingerprint("a", "c") != run_fingerprint("b", "c")


@pytest.mark.parametrize("memory", [0, 50, 10**6])
@given(seed=st.integers(0, 1000))
def test_rows_come_out_in_input_order(memory, seed):
    places = list(range(100))
    random.Random(seed).shuffle(places)
    written = []
    order = InputOrder(written.append, memory_bytes=memory)
    for place in places:
        order.put(place, b"%d\n" % place * (place % 5 + 1))
    assert written == [b"%d\n" % place * (place % 5 + 1) for place in range(100)]
    assert len(order) == 0 and order._held_bytes == 0


def test_waiting_rows_go_to_disk():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    written = 0

    def count(line):
        nonlocal written
        written += len(line)

    order = InputOrder(count, memory_bytes=1 << 20)
    line = b"x" * 100_000
    for place in range(1, 2001):
        order.put(place, line)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024  # KiB, for 200 MB of rows
    order.put(0, line)
    assert written == 2001 * len(line)
