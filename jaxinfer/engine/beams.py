"""A request answered by beam search: its beams are sequences that share pages."""

from __future__ import annotations

import numpy as np

from jaxinfer.core import Choice, Completion, FinishReason, Request, Usage
from jaxinfer.engine.beam_search import Answer, BeamSearch, Candidates, Pick
from jaxinfer.engine.sampler import INVALID_TOKEN, Sampled
from jaxinfer.engine.sequence import Sequence, common_length
from jaxinfer.engine.stopping import StopRule, TextTokenizer, stop_ids
from jaxinfer.errors import RequestError
from jaxinfer.kvcache.cache import PageCache


class Beams:
    """The sequences of one beam search, at first the prompt alone. They start, stop and give way together.

    Attributes:
      width: most of them, each of which has a slot while they run.
      candidates: of the likeliest next tokens of each, how many the search needs.
      sequences: the present ones, best first.
      slots: those of the beams that are not there yet.
    """

    def __init__(self, width: int, candidates: int, prompt: Sequence):
        self.width, self.candidates = width, candidates
        self.sequences = [prompt]
        self.slots: list[int] = []
        self._read: dict[Sequence, Candidates] = {}
        prompt.beams = self

    def read(self, sequence: Sequence, candidates: Candidates) -> list[Candidates] | None:
        """Takes the candidates of one beam; gives those of all, in their order, once they are there."""
        self._read[sequence] = candidates
        if len(self._read) < len(self.sequences):
            return None
        every = [self._read[each] for each in self.sequences]
        self._read.clear()
        return every

    def fork(self, picks: list[Pick], cache: PageCache) -> None:
        """Go on as the search says. What beams have in common stays one page; who writes first to a shared page copies it."""
        parents, heirs = self.sequences, {pick.parent for pick in picks}
        for index, parent in enumerate(parents):
            if index not in heirs:
                cache.release(parent.pages, parent.nodes)
                self.slots.append(parent.slot)
        children: list[Sequence] = []
        for pick in picks:
            parent = parents[pick.parent]
            if pick.parent in heirs:  # the first child is the parent itself
                heirs.remove(pick.parent)
                parent.forked_from = parent.slot
                children.append(parent)
            else:
                cache.share(parent.pages)
                children.append(parent.fork(self.slots.pop()))
        for child, pick in zip(children, picks, strict=True):
            child.append(pick.token)
        self.sequences = children

    def rewind(self, page_size: int) -> None:
        """Forget every computed key. Whoever starts again shares what it can with one before it: whole pages, and no more than
        `dense_tokens`, for keys after those depend on what was chosen for the sequence's own slot."""
        self._read.clear()
        for index, sequence in enumerate(self.sequences):
            sequence.rewind()
            for other in self.sequences[:index]:
                common = min(common_length(sequence.tokens, other.tokens), sequence.dense_tokens)
                if common // page_size * page_size > sequence.source_tokens:
                    sequence.source, sequence.source_tokens = other, common // page_size * page_size

    def fail(self, error: RequestError) -> None:
        for sequence in self.sequences:
            sequence.error = error


def has_source(beam: Sequence, cache: PageCache) -> bool:
    """Whether what a beam that starts again shares with another is computed; then it has those pages too."""
    source, count = beam.source, beam.source_tokens // cache.page_size
    if source is not None:
        if source.computed < beam.source_tokens:
            return False
        beam.source, beam.computed = None, beam.source_tokens
        beam.pages = source.pages[:count]
        cache.share(beam.pages)
        beam.published = min(source.published, count)
        beam.nodes = source.nodes[: beam.published]
        beam.tail = source.tail if beam.published == source.published else beam.nodes[-1]
    return True


def owns_page(beam: Sequence, cache: PageCache) -> bool:
    """Whether no other beam has the page to which the next token goes; it gets a copy to make it so, if there is a page."""
    index = beam.computed // cache.page_size
    shared = beam.pages[index]
    if not cache.is_shared(shared):
        return True
    pages = cache.allocate(1)
    if pages is None:
        return False
    cache.release([shared])
    beam.pages[index] = pages[0]
    beam.copied = (shared, pages[0])
    return True


class OpenBeams:
    """A request being worked on by beam search."""

    def __init__(
        self,
        request: Request,
        limit: int,
        namespace: int,
        *,
        eos_ids: tuple[int, ...],
        tokenizer: TextTokenizer | None,
        dense_tokens: int,
    ):
        self.request = request
        self._eos_ids, self._tokenizer = eos_ids, tokenizer
        prompt = Sequence(request, 0, limit=limit, namespace=namespace, dense_tokens=dense_tokens)
        sampling = request.sampling
        self.sequences = [prompt]
        self._search = BeamSearch(
            sampling.beam_width,
            limit - prompt.prompt_length,
            stop_ids(sampling, eos_ids),
            fewest=sampling.min_tokens,
            length_penalty=sampling.length_penalty,
            early_stopping=sampling.early_stopping,
            alternatives=sampling.logprobs or 0,
        )
        self.beams = Beams(sampling.beam_width, self._search.candidates_needed, prompt)

    @property
    def done(self) -> bool:
        return self._search.over or self.beams.sequences[0].error is not None

    def accept(self, sequence: Sequence, sampled: Sampled, at: tuple[int, ...]) -> list[Pick]:
        """Take the candidates at index `at`; with those of the last beam, how all go on. The last step finishes them."""
        if int(sampled.tokens[at]) == INVALID_TOKEN:
            self.beams.fail(RequestError("model_failure", "the model's scores were not finite numbers"))
            return []
        candidates = self.beams.read(sequence, Candidates(sampled.top_ids[at], sampled.top_logprobs[at]))
        if candidates is None:
            return []
        picks = self._search.step(candidates)
        if self._search.over:
            for beam in self.beams.sequences:
                beam.finish_reason = FinishReason.LENGTH
        return picks

    @property
    def _best(self) -> list[Answer]:
        return self._search.answers[: self.request.sampling.n]

    @property
    def generated(self) -> int:
        """Tokens of its choices."""
        return sum(answer.trail.length for answer in self._best)

    def completion(self) -> Completion:
        first = self.beams.sequences[0]
        usage = Usage(
            prompt_tokens=first.prompt_length,
            completion_tokens=self.generated,
            cached_tokens=first.cached_tokens or 0,
        )
        if first.error is not None:
            return Completion(request_id=self.request.id, usage=usage, error=first.error)
        choices = tuple(self._choice(index, answer) for index, answer in enumerate(self._best))
        return Completion(request_id=self.request.id, choices=choices, usage=usage)

    def _choice(self, index: int, answer: Answer) -> Choice:
        sampling = self.request.sampling
        entries = answer.trail.entries()
        tokens = np.array([entry.token_id for entry in entries], np.int32)
        rule = StopRule(sampling, self._eos_ids, self._tokenizer)
        reason = rule.accept(int(tokens[-1]))
        return Choice(
            index=index,
            text=rule.text_of(tokens),
            token_ids=tuple(tokens.tolist()),
            finish_reason=reason or FinishReason.LENGTH,
            logprobs=None if sampling.logprobs is None else tuple(entries),
        )
