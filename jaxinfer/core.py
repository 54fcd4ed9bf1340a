"""The vocabulary that every part of jaxinfer speaks: requests, sampling, sequences, completions."""

from __future__ import annotations

import enum
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jaxinfer.errors import RequestError

MAX_TOP_LOGPROBS = 20  # OpenAI's limit; also the static width of the device's top-k
MAX_LOGIT_BIAS = 1024
MAX_BEAM_WIDTH = 128
MAX_STOP_TOKEN_IDS = 64
MAX_SEED = 2**63 - 1
MIN_REPETITION_PENALTY = 0.01  # logits are divided by it; float32 rounds the smallest positive numbers to 0


class LogitBias(Mapping[int, float]):
    """Token id -> value added to its logit. Cannot be changed, so that it has a hash."""

    def __init__(self, values: Mapping[int, float] | None = None):
        self._values = dict(values or {})

    def __getitem__(self, token: int) -> float:
        return self._values[token]

    def __iter__(self) -> Iterator[int]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __hash__(self) -> int:
        return hash(frozenset(self._values.items()))

    def __repr__(self) -> str:
        return repr(self._values)


class FinishReason(enum.StrEnum):
    """Why a choice ended. Values are those of the OpenAI API."""

    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How the tokens of one request are chosen. Every field has the meaning of the OpenAI API or of vLLM.

    Attributes:
      max_tokens: most tokens to generate; None fills the context.
      min_tokens: end-of-sequence and stop tokens are forbidden before this many tokens; stop strings are not looked for.
      temperature: 0 is greedy.
      top_p: keep the smallest set of most likely tokens that holds this probability, in (0, 1].
      top_k: keep this many most likely tokens; 0 keeps all.
      min_p: drop tokens less likely than this share of the likeliest one, in [0, 1].
      seed: with the position it determines every draw; None takes one from the request's identity.
      n: number of choices.
      beam_width: above 1, beam search with so many beams, whose n best answers are the choices; it draws nothing, so the
        temperature must be 0. Penalties, biases and stop strings do not go with it.
      length_penalty: beam search ranks answers by their log-probability over length to this power, in [-5, 5].
      early_stopping: whether beam search ends at beam_width answers. False looks whether the best beam could still
        beat the worst of them at its present length, "never" whether it could at any.
      stop: strings that end a choice (and are cut from its text).
      stop_token_ids: token ids that end a choice (and are kept in token_ids, not in the text).
      ignore_eos: go on past the model's end-of-sequence tokens.
      logprobs: None for none, else how many of the most likely tokens to report beside the chosen one, 0-20.
      presence_penalty, frequency_penalty: OpenAI's, over generated tokens, in [-2, 2].
      repetition_penalty: over prompt and generated tokens, in [0.01, 100]; 1 is off.
      logit_bias: token id -> value added to its logit, in [-100, 100].

    Raises:
      RequestError: a value out of range, with the field's name.
    """

    max_tokens: int | None = None
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    n: int = 1
    beam_width: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = LogitBias()

    def __post_init__(self):
        texts = (self.stop,) if isinstance(self.stop, str) else _several("stop", self.stop, "strings")
        object.__setattr__(self, "stop", texts)
        ids = _several("stop_token_ids", self.stop_token_ids, "token ids")
        object.__setattr__(self, "stop_token_ids", ids)
        if not isinstance(self.logit_bias, Mapping | None):
            shown = _shown(self.logit_bias)
            raise RequestError(
                "invalid_type", f"logit_bias: {shown} is not a mapping of token ids to numbers"
            )
        object.__setattr__(self, "logit_bias", LogitBias(self.logit_bias))
        if self.max_tokens is not None:
            _whole("max_tokens", self.max_tokens, 1, None)
        _whole("min_tokens", self.min_tokens, 0, self.max_tokens)
        _real("temperature", self.temperature, 0, 100)
        _real("top_p", self.top_p, 0, 1, open_low=True)
        _whole("top_k", self.top_k, -1, None)
        _real("min_p", self.min_p, 0, 1)
        if self.seed is not None:
            _whole("seed", self.seed, -MAX_SEED, MAX_SEED)
        _whole("n", self.n, 1, 128)
        _whole("beam_width", self.beam_width, 1, MAX_BEAM_WIDTH)
        _real("length_penalty", self.length_penalty, -5, 5)
        if not isinstance(self.early_stopping, bool) and self.early_stopping != "never":
            shown = _shown(self.early_stopping)
            raise RequestError("invalid_value", f'early_stopping: {shown} is not true, false or "never"')
        for text in self.stop:
            if not isinstance(text, str) or not text:
                raise RequestError("invalid_value", f"stop: {_shown(text)} is not a non-empty string")
        if len(self.stop_token_ids) > MAX_STOP_TOKEN_IDS:
            raise RequestError(
                "invalid_value", f"stop_token_ids: at most {MAX_STOP_TOKEN_IDS} ids are accepted"
            )
        for token in self.stop_token_ids:
            _whole("stop_token_ids", token, 0, None)
        if not isinstance(self.ignore_eos, bool):
            raise RequestError("invalid_type", f"ignore_eos: {_shown(self.ignore_eos)} is not true or false")
        if self.logprobs is not None:
            _whole("logprobs", self.logprobs, 0, MAX_TOP_LOGPROBS)
        _real("presence_penalty", self.presence_penalty, -2, 2)
        _real("frequency_penalty", self.frequency_penalty, -2, 2)
        _real("repetition_penalty", self.repetition_penalty, MIN_REPETITION_PENALTY, 100)
        if len(self.logit_bias) > MAX_LOGIT_BIAS:
            raise RequestError("invalid_value", f"logit_bias: at most {MAX_LOGIT_BIAS} entries are accepted")
        for token, bias in self.logit_bias.items():
            _whole("logit_bias token id", token, 0, None)
            _real("logit_bias", bias, -100, 100)
        self._check_beams()

    def _check_beams(self) -> None:
        """What goes with beam search, and what without."""
        beams = self.beam_width > 1
        accepted: tuple[tuple[str, Any, bool], ...] = (
            ("temperature", 0, beams),
            ("stop", (), beams),
            ("presence_penalty", 0, beams),
            ("frequency_penalty", 0, beams),
            ("repetition_penalty", 1, beams),
            ("logit_bias", {}, beams),
            ("length_penalty", 1, not beams),
            ("early_stopping", False, not beams),
        )
        for name, value, matters in accepted:
            given = getattr(self, name)
            if matters and given != value:
                shown = "none" if value in ((), {}) else value
                raise RequestError(
                    "invalid_value",
                    f"{name}: {_shown(given)} does not go with beam_width: {self.beam_width}; accepted is {shown}",
                )
        if beams and self.n > self.beam_width:
            raise RequestError(
                "invalid_value",
                f"n: {self.n} answers of {self.beam_width} beams; at most beam_width are accepted",
            )

    @property
    def sequences(self) -> int:
        """Answers worked on at once: the choices, or the beams."""
        return max(self.n, self.beam_width)

    @property
    def has_penalties(self) -> bool:
        return (self.presence_penalty, self.frequency_penalty, self.repetition_penalty) != (0, 0, 1)


def _whole(name: str, value, low: int | None, high: int | None) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise RequestError("invalid_type", f"{name}: {_shown(value)} is not a whole number")
    if (low is not None and value < low) or (high is not None and value > high):
        raise RequestError("invalid_value", f"{name}: {_shown(value)} is not {_range(low, high)}")


def _real(name: str, value, low: float, high: float, *, open_low: bool = False) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise RequestError("invalid_type", f"{name}: {_shown(value)} is not a number")
    if not low <= value <= high or (open_low and value == low):  # NaN is within no limits
        raise RequestError(
            "invalid_value", f"{name}: {_shown(value)} is not in {'(' if open_low else '['}{low}, {high}]"
        )


def _several(name: str, values, of: str) -> tuple:
    if values is None:
        return ()
    if not isinstance(values, (list, tuple, set, frozenset, range, np.ndarray)):
        raise RequestError("invalid_type", f"{name}: {_shown(values)} is not a list of {of}")
    return tuple(values)


def _shown(value) -> str:
    """The value for a message: short, whatever it is."""
    try:
        text = str(value) if isinstance(value, (int, float, np.generic)) else repr(value)
    except ValueError:  # Python does not write out integers of more than 4300 digits
        return "a number of thousands of digits"
    return text if len(text) <= 80 else f"{text[:77]}..."


def _range(low, high) -> str:
    return f"at least {low}" if high is None else f"between {low} and {high}"


@dataclass(frozen=True, kw_only=True)
class Request:
    """One prompt to complete.

    Attributes:
      id: unique within a run; a batch row's custom_id.
      prompt_ids: int32 [prompt_tokens].
      sampling: how to choose its tokens.
      score: generate nothing, but report the log-probability of every prompt token after the first.
    """

    id: str
    prompt_ids: np.ndarray
    sampling: SamplingParams = field(default_factory=SamplingParams)
    score: bool = False


@dataclass(frozen=True)
class TokenLogprob:
    """Log-probability (natural, of the model's own distribution before temperature and filters) of a chosen token.

    Attributes:
      top: the most likely tokens at that position, (token id, log-probability), likeliest first.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One generated answer."""

    index: int = 0
    text: str = ""
    token_ids: tuple[int, ...] = ()
    finish_reason: FinishReason = FinishReason.LENGTH
    logprobs: tuple[TokenLogprob, ...] | None = None


@dataclass(frozen=True)
class Usage:
    """Token counts of one request, all its choices together; cached_tokens is the part of the prompt not computed."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0


@dataclass(frozen=True, kw_only=True)
class Completion:
    """What became of one request: its choices, or the error that concerns it alone.

    Attributes:
      prompt_logprobs: float32 [prompt_tokens - 1], of scored requests.
    """

    request_id: str
    choices: tuple[Choice, ...] = ()
    usage: Usage = Usage()
    error: RequestError | None = None
    prompt_logprobs: np.ndarray | None = None

    @property
    def text(self) -> str:
        return self.choices[0].text if self.choices else ""

    @property
    def token_ids(self) -> tuple[int, ...]:
        return self.choices[0].token_ids if self.choices else ()

    @property
    def finish_reason(self) -> FinishReason | None:
        return self.choices[0].finish_reason if self.choices else None

    @property
    def logprobs(self) -> tuple[TokenLogprob, ...] | None:
        return self.choices[0].logprobs if self.choices else None


TokenIds = SequenceOf[int] | np.ndarray
