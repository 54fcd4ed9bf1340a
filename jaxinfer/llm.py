"""The library call: a model folder in, completions out."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from jaxinfer.attention.policy import quest_policy
from jaxinfer.config import Settings
from jaxinfer.core import Completion, Request, SamplingParams, TokenIds
from jaxinfer.engine.apart import Apart
from jaxinfer.engine.blend import Blend
from jaxinfer.engine.engine import Engine
from jaxinfer.engine.memory import MemoryPlan
from jaxinfer.errors import ModelError, RequestError
from jaxinfer.models.checkpoint import Manifest, load_model, read_manifest
from jaxinfer.models.tokenizer import Tokenizer, has_tokenizer
from jaxinfer.offload.records import expert_record
from jaxinfer.offload.store import ExpertStore
from jaxinfer.scaleout.mesh import spread_over
from jaxinfer.schedule.workload import Sharing, Workload

EMBEDDED_MODEL = Path(__file__).parent / "assets" / "model"
Prompt = str | TokenIds
Message = Mapping[str, Any]


class LLM:
    """A model ready to answer.

    Args:
      model: folder written by jaxinfer-convert; None for `config.model.path`, or the embedded model.
      config: settings of the run.

    Attributes:
      tokenizer: None if the model folder has none; then prompts are token ids and answers have no text.
      model_name: name of the folder.
      model_fingerprint: identifies the model's results.

    Raises:
      ModelError: the folder cannot be read.
      ConfigError: the settings do not fit the model or the machine.
    """

    def __init__(self, model: str | os.PathLike | None = None, *, config: Settings | None = None):
        if not isinstance(config, Settings | None):
            raise TypeError(f"config: expected Settings, as load_config gives, not {type(config).__name__}")
        settings = config or Settings()
        folder = Path(model or settings.model.path or EMBEDDED_MODEL)
        _claim_device_memory()
        _use_compilation_cache(settings.engine.compile_cache)
        manifest = read_manifest(folder)
        _check_mode(folder, manifest, settings.quantization.mode)
        dtype = manifest.dtype if settings.model.dtype == "auto" else settings.model.dtype
        unrolled = settings.engine.layers == "unrolled" or (
            settings.engine.layers == "auto" and jax.default_backend() == "cpu"
        )
        spread = spread_over(manifest.config, settings)
        store = _expert_store(folder, manifest, settings)
        layout: Literal["stacked", "unstacked"] = "unstacked" if unrolled else "stacked"
        model_config, weights = load_model(
            folder, dtype=dtype, layout=layout, sharding=spread.place, experts=store is None
        )
        self.model_name = folder.resolve().name
        self.model_fingerprint = manifest.fingerprint
        self.settings = settings
        self.tokenizer = Tokenizer(folder) if has_tokenizer(folder) else None
        shares = spread.shares(weights)
        self.engine = Engine(model_config, shares, settings, self.tokenizer, store, spread)

    def generate(
        self, prompts: Iterable[Prompt], sampling: SamplingParams | Iterable[SamplingParams] | None = None
    ) -> Iterator[Completion]:
        """Complete texts or token ids. Yields one Completion per prompt, in order.

        Args:
          prompts: read as the engine has room for more.
          sampling: for all prompts, or one each; the default samples at temperature 1 until the context is full.

        A prompt that cannot be served yields a Completion with its `error`.
        """
        pairs = _pairs("prompts", prompts, sampling)
        return self._in_order((self._ids(p), s, False) for p, s in pairs)

    def chat(
        self,
        conversations: Iterable[list[Message]],
        sampling: SamplingParams | Iterable[SamplingParams] | None = None,
    ) -> Iterator[Completion]:
        """As `generate`, for lists of messages {"role", "content"} in the model's chat template."""
        pairs = _pairs("conversations", conversations, sampling)
        return self._in_order((self._chat_ids(c), s, False) for c, s in pairs)

    def score(self, prompts: Prompt | Iterable[Prompt]) -> np.ndarray | list[np.ndarray]:
        """Log-probability (natural) of every token after the first: float32 [tokens - 1].

        Args:
          prompts: a text or its token ids; or an iterable of those, which gives a list.

        Raises:
          RequestError: a prompt is empty, too long or no prompt at all.
        """
        single = _is_prompt(prompts)
        several: Iterable[Any] = [prompts] if single else _iterable("prompts", prompts)
        jobs = ((self._ids(p), SamplingParams(), True) for p in several)
        scores: list[np.ndarray] = []
        for out in self._in_order(jobs):
            if out.error is not None:
                raise out.error
            assert out.prompt_logprobs is not None
            scores.append(out.prompt_logprobs)
        return scores[0] if single else scores

    def stream(self, requests: Iterable[Request], plan: Blend | Apart | None = None) -> Iterator[Completion]:
        """Completions in the order in which they finish; `requests` is read as the engine has room for more.

        Closing the iterator cancels what is unfinished.

        Args:
          plan: from `blend`; `requests` then come in the order of its `indices`.
        """
        return self.engine.run(requests, plan)

    def blend(self, workload: Workload, sharing: Sharing) -> Blend | Apart:
        """A plan for a whole batch by its compute and memory demand, see `schedule.policy`."""
        return self.engine.blend(workload, sharing)

    def token_limit(self, request: Request) -> int:
        """Most tokens of the prompt and one answer.

        Raises:
          RequestError: the request can never be served, with the reason that its completion would give.
        """
        return self.engine.token_limit(request)

    def warm_up(self) -> None:
        """Compile everything now rather than when it is first needed."""
        self.engine.warm_up()

    def metrics(self) -> dict[str, float]:
        """Counters since the model was loaded, see `engine.metrics.Metrics` and, with experts on the host,
        `offload.exchange.Traffic`."""
        offload = self.engine.offload
        return self.engine.metrics.as_dict() | ({} if offload is None else offload.metrics())

    def _in_order(self, jobs: Iterable[tuple[Any, SamplingParams, bool]]) -> Iterator[Completion]:
        done: dict[int, Completion] = {}
        refused: dict[int, RequestError] = {}

        def requests() -> Iterator[Request]:
            for index, (ids, sampling, score) in enumerate(jobs):
                if isinstance(ids, RequestError):
                    # The engine refuses an empty prompt at once, so it reads no further than for other requests.
                    refused[index], ids = ids, np.zeros(0, np.int32)
                yield Request(id=str(index), prompt_ids=ids, sampling=sampling, score=score)

        turn = 0
        for out in self.engine.run(requests()):
            index = int(out.request_id)
            error = refused.pop(index, None)
            done[index] = out if error is None else replace(out, error=error)
            while turn in done:
                yield done.pop(turn)
                turn += 1

    def _ids(self, prompt: Any) -> np.ndarray | RequestError:
        try:
            return self.prompt_ids(prompt)
        except RequestError as error:
            return error

    def prompt_ids(self, prompt: Prompt) -> np.ndarray:
        """int32 token ids of a text (with the special tokens that the model adds) or of ids given as such.

        Raises:
          RequestError: neither of both, or text for a model without a tokenizer.
        """
        if isinstance(prompt, str):
            return np.asarray(self._need_tokenizer().encode(prompt), np.int32)
        try:
            ids = np.asarray(prompt)
        except ValueError:
            ids = np.asarray(None)
        if ids.ndim != 1 or not (ids.size == 0 or np.issubdtype(ids.dtype, np.integer)):
            raise RequestError(
                "invalid_prompt", f"prompt: expected text or a list of token ids, not {type(prompt).__name__}"
            )
        if ids.size and (ids.min() < 0 or ids.max() > np.iinfo(np.int32).max):
            raise RequestError("invalid_token", "prompt: token ids must be in the vocabulary")
        return ids.astype(np.int32)

    def _chat_ids(self, messages: list[Message]) -> np.ndarray | RequestError:
        try:
            return np.asarray(self._need_tokenizer().chat(messages), np.int32)
        except RequestError as error:
            return error

    def _need_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise RequestError(
                "no_tokenizer", f"the model {self.model_name} has no tokenizer; give token ids"
            )
        return self.tokenizer


def _check_mode(folder: Path, manifest: Manifest, wanted: str) -> None:
    mode = "none" if manifest.quantization is None else manifest.quantization.mode
    if wanted not in ("", mode):
        raise ModelError(
            f"{folder}: its quantization is {mode}, quantization.mode asks for {wanted}; "
            f"convert the model again with --quant {wanted}, or leave the setting away"
        )


def _expert_store(folder: Path, manifest: Manifest, settings: Settings) -> ExpertStore | None:
    """The experts that do not go to the device with the model; None if all do."""
    if settings.offload.device_memory is None:
        return None
    config = manifest.config
    # before anything is read or written: raises where the settings do not fit the model
    plan = MemoryPlan.make(config, settings, quest_policy(settings, config.context_length))
    record = expert_record(config, settings.offload, plan.dtype)
    return ExpertStore.open(folder, manifest, record, settings.offload.folder)


def _is_prompt(prompts: Any) -> bool:
    if isinstance(prompts, str) or (isinstance(prompts, np.ndarray) and prompts.ndim == 1):
        return True
    ids = isinstance(prompts, (list, tuple)) and all(isinstance(p, (int, np.integer)) for p in prompts)
    return ids and len(prompts) > 0  # an empty list holds no prompts


def _iterable(name: str, values: Any) -> Iterable[Any]:
    if isinstance(values, (str, bytes, Mapping)) or not isinstance(values, Iterable):
        raise TypeError(f"{name}: expected a list or another iterable of them, not {type(values).__name__}")
    return values


def _pairs(
    name: str, items: Iterable[Any], sampling: SamplingParams | Iterable[SamplingParams] | None
) -> Iterator[tuple[Any, SamplingParams]]:
    """Every item with its sampling parameters. Raises TypeError at once for arguments that are neither."""
    if isinstance(items, Sequence) and items and isinstance(items[0], Mapping):
        raise TypeError(f"{name}: expected a list of lists of messages; wrap one conversation in a list")
    items = _iterable(name, items)
    if sampling is None or isinstance(sampling, SamplingParams):
        return zip(items, itertools.repeat(sampling or SamplingParams()))
    if isinstance(sampling, (str, bytes, Mapping)) or not isinstance(sampling, Iterable):
        raise TypeError(f"sampling: expected SamplingParams, or one for each prompt, not {sampling!r}")
    return _each_its_own(iter(items), iter(sampling))


def _each_its_own(items: Iterator[Any], sampling: Iterator[Any]) -> Iterator[tuple[Any, SamplingParams]]:
    end = object()  # what the iterators themselves raise passes as it is
    while True:
        item, chosen = next(items, end), next(sampling, end)
        if item is end and chosen is end:
            return
        if item is end or chosen is end:
            raise ValueError("sampling: expected one SamplingParams, or as many as there are prompts")
        if not isinstance(chosen, SamplingParams):
            raise TypeError(f"sampling: expected a SamplingParams for each prompt, not {chosen!r}")
        yield item, chosen


def _claim_device_memory() -> None:
    """JAX takes three quarters of a GPU where nobody says otherwise; the KV pool wants what the rest leaves.

    Without effect where the process has used the GPU before.
    """
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")


def _use_compilation_cache(folder: str) -> None:
    """Compiled programs outlive the process: a second run of the same model starts at once."""
    if folder == "off" or (folder == "auto" and jax.config.jax_compilation_cache_dir is not None):
        return
    if folder == "auto":
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        folder = str(home / "jaxinfer" / "xla")
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
