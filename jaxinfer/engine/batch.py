"""A step plan as padded arrays of static shapes.

Each group of fields travels as one matrix, because every separate array costs a transfer. The same NamedTuple names the
rows of the matrix on both sides: views to fill on the host, arrays to read on the device.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from jaxinfer.core import SamplingParams
from jaxinfer.engine.plan import Chunk, StepPlan
from jaxinfer.engine.sequence import Sequence

TOKEN_FROM_SLOT = -1
_INT32_MAX = 2**31 - 1


class Tokens(NamedTuple):
    """Flat tokens of a mixed step: decoding sequences first, then chunks. int32 [T] each.

    Attributes:
      ids: token id; TOKEN_FROM_SLOT where the device holds it, as the token its slot sampled last.
      slots: slot of the sequence.
      positions: in the sequence.
      rope_lengths: sequence length that governs the rotation.
      kv_slots: where its keys go, page * page_size + offset; -1 for padding.
      targets: token that follows (scored sequences).
    """

    ids: Any
    slots: Any
    positions: Any
    rope_lengths: Any
    kv_slots: Any
    targets: Any


class Rows(NamedTuple):
    """Sequences of a step. int32 [S] each.

    Attributes:
      slots: of the device's per-sequence state; the spare last slot for padding.
      starts: index of its first token in the flat tokens.
      counts: its tokens in this step (mixed), or steps it takes part in (decode); 0 for padding.
      kv_lengths: its keys once this step is written (mixed) or before the first of the steps (decode).
      sparse_from: tokens from this one on choose the pages they attend to.
      rope_floors: shortest sequence length that governs its rotations.
      prompt_lengths: tokens of its prompt.
      min_lengths: no end-of-sequence token before this length of prompt and answer.
      seeds_high, seeds_low: the two words of its random key.
      top_ks: 0 for all.
      biased: 1 where its slot holds logit biases of its own.
      samples: 1 where the token after the last one is wanted.
      single: 1 where its one token takes the attention of decoding.
    """

    slots: Any
    starts: Any
    counts: Any
    kv_lengths: Any
    sparse_from: Any
    rope_floors: Any
    prompt_lengths: Any
    min_lengths: Any
    seeds_high: Any
    seeds_low: Any
    top_ks: Any
    biased: Any
    samples: Any
    single: Any


class Knobs(NamedTuple):
    """Sampling parameters of the rows. float32 [S] each."""

    temperatures: Any
    top_ps: Any
    min_ps: Any
    presence: Any
    frequency: Any
    repetition: Any


class Needs(NamedTuple):
    """What any row of the step asks of the sampler; bool scalars, so that a step skips what none asks for."""

    draws: Any
    filters: Any
    penalties: Any
    biases: Any
    logprobs: Any


class Batch(NamedTuple):
    """tokens: int32 [6, T] (None in decode calls); rows: int32 [14, S]; knobs: float32 [6, S]; needs: bool [5], None
    where every row is plain greedy (those programs hold no sampler and compile in half the time);
    page_table: int32 [S, P]."""

    tokens: Any
    rows: Any
    knobs: Any
    needs: Any
    page_table: Any


class Batcher:
    """Builds batches. `max_seqs` is also the number of the spare slot that padding rows use."""

    def __init__(self, max_seqs: int, table_width: int, page_size: int):
        self.max_seqs = max_seqs
        self.table_width = table_width
        self.page_size = page_size

    def decode(self, plan: StepPlan, size: int) -> Batch:
        """A call of decode steps, `size` rows."""
        batch = self._rows(plan.decodes, size)
        rows = Rows(*batch.rows)
        rows.kv_lengths[: len(plan.decodes)] = [c.start for c in plan.decodes]
        return batch

    def mixed(self, plan: StepPlan, size: int, *, singles_first: bool = False) -> Batch:
        """A step of `size` flat tokens, those of single rows before all others if asked for."""
        chunks = plan.decodes + plan.prefills
        batch = self._rows(chunks, min(size, self.max_seqs))
        rows = Rows(*batch.rows)
        count = len(chunks)
        order = np.argsort(1 - rows.single[:count], kind="stable") if singles_first else np.arange(count)
        rows.starts[order] = np.cumsum(rows.counts[order]) - rows.counts[order]
        rows.kv_lengths[:count] = [c.start + c.count for c in chunks]
        matrix = np.zeros((len(Tokens._fields), size), np.int32)
        tokens = Tokens(*matrix)
        tokens.kv_slots[:] = -1
        tokens.slots[:] = self.max_seqs
        for row, chunk in enumerate(chunks):
            self._fill(tokens, int(rows.starts[row]), chunk, batch.page_table[row])
        return batch._replace(tokens=matrix)

    def _fill(self, tokens: Tokens, start: int, chunk: Chunk, pages: np.ndarray) -> None:
        sequence, count = chunk.sequence, chunk.count
        known = sequence.tokens[chunk.start : chunk.start + count]
        here = slice(start, start + count)
        positions = np.arange(chunk.start, chunk.start + count, dtype=np.int32)
        tokens.ids[here] = TOKEN_FROM_SLOT if chunk.decodes else known
        tokens.slots[here] = sequence.slot
        tokens.positions[here] = positions
        tokens.rope_lengths[here] = np.maximum(sequence.rope_floor, positions + 1)
        tokens.kv_slots[here] = (
            pages[positions // self.page_size] * self.page_size + positions % self.page_size
        )
        if sequence.request.score:
            following = sequence.tokens[chunk.start + 1 : chunk.start + count + 1]
            tokens.targets[start : start + len(following)] = following

    def _rows(self, chunks: list[Chunk], size: int) -> Batch:
        matrix = np.zeros((len(Rows._fields), size), np.int32)
        settings = np.zeros((len(Knobs._fields), size), np.float32)
        page_table = np.zeros((size, self.table_width), np.int32)
        rows, knobs = Rows(*matrix), Knobs(*settings)
        rows.slots[:] = self.max_seqs
        knobs.top_ps[:] = knobs.repetition[:] = 1
        needs = np.zeros(len(Needs._fields), bool)
        for row, chunk in enumerate(chunks):
            sequence = chunk.sequence
            matrix[:, row] = self._row(sequence)
            rows.counts[row] = chunk.count
            rows.samples[row] = chunk.samples
            rows.single[row] = chunk.decodes or chunk.sparse
            if chunk.samples and not _is_plain(sequence.request.sampling):
                settings[:, row] = _knobs(sequence.request.sampling)
                needs |= needs_of(sequence.request.sampling)
            page_table[row, : len(sequence.pages)] = sequence.pages
        return Batch(None, matrix, settings, needs if needs.any() else None, page_table)

    def _row(self, sequence: Sequence) -> Rows:
        sampling = sequence.request.sampling
        return Rows(
            slots=sequence.slot,
            starts=0,
            counts=0,
            kv_lengths=0,
            sparse_from=min(sequence.dense_tokens, _INT32_MAX),
            rope_floors=sequence.rope_floor,
            prompt_lengths=sequence.prompt_length,
            min_lengths=sequence.prompt_length + sampling.min_tokens,
            seeds_high=sequence.seed[0],
            seeds_low=sequence.seed[1],
            top_ks=min(max(sampling.top_k, 0), _INT32_MAX),
            biased=int(bool(sampling.logit_bias)),
            samples=0,
            single=0,
        )


def needs_of(sampling: SamplingParams) -> Needs:
    if sampling.beam_width > 1:  # the host chooses, and forbids what has to be
        return Needs(draws=False, filters=False, penalties=False, biases=False, logprobs=True)
    draws = sampling.temperature > 0
    return Needs(
        draws=draws,
        filters=draws and (sampling.top_k > 0 or sampling.top_p < 1 or sampling.min_p > 0),
        penalties=sampling.has_penalties,
        biases=bool(sampling.logit_bias) or sampling.min_tokens > 0,
        logprobs=sampling.logprobs is not None,
    )


def _knobs(sampling: SamplingParams) -> Knobs:
    return Knobs(
        sampling.temperature,
        sampling.top_p,
        sampling.min_p,
        sampling.presence_penalty,
        sampling.frequency_penalty,
        sampling.repetition_penalty,
    )


def _is_plain(sampling: SamplingParams) -> bool:
    return not any(needs_of(sampling))
