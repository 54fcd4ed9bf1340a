"""Settings of a run: frozen dataclasses, read from TOML and `--set section.key=value`."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import tomllib
import typing
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from jaxinfer.errors import ConfigError
from jaxinfer.fields import Section, close_match, memory_problem, setting, types_of


@dataclass(frozen=True, kw_only=True)
class ModelSettings(Section):
    """Which model answers.

    Attributes:
      path: converted model folder; empty is the embedded model.
      dtype: of weights and activations; "auto" is the checkpoint's own.
    """

    section: ClassVar[str] = "model"
    path: str = setting("")
    dtype: str = setting("auto", choices=("auto", "float32", "bfloat16"), answers=True)


@dataclass(frozen=True, kw_only=True)
class CacheSettings(Section):
    """The paged KV cache.

    Attributes:
      page_size: tokens per page.
      pages: pages in the pool, the padding page included; None derives it from `memory`.
      memory: for the pool: a share of the device's free memory in (0, 1], or bytes ("8GiB"); None lets the engine choose.
      prefix_sharing: requests with a common prefix compute and hold it once.
      dtype: of keys and values; "auto" is the type that the model computes in. "int8" and "int4" keep each token's head
        vector as codes with a step and a smallest value (as Atom does, without its clamped zero point).
    """

    section: ClassVar[str] = "cache"
    page_size: int = setting(16, choices=(8, 16, 32, 64, 128))
    pages: int | None = setting(None, low=2)
    memory: float | str | None = setting(None, check=memory_problem)
    prefix_sharing: bool = setting(True)
    dtype: str = setting("auto", choices=("auto", "float32", "bfloat16", "int8", "int4"), answers=True)


@dataclass(frozen=True, kw_only=True)
class MeshShape:
    """How many devices a model is spread over, tensor times expert.

    Attributes:
      tensor: parts of every layer: its heads, the width of its MLP or of each expert; and of the vocabulary.
      expert: parts of the experts. Heads, vocabulary and MLPs without experts are split over all devices where they can be.
    """

    tensor: int = 1
    expert: int = 1


def mesh_problem(value: MeshShape | dict) -> str | None:
    given = dataclasses.asdict(value) if isinstance(value, MeshShape) else value
    known = {axis.name for axis in dataclasses.fields(MeshShape)}
    if set(given) <= known and all(type(size) is int and 1 <= size <= 2**16 for size in given.values()):
        return None
    return "a table of tensor and expert, whole numbers from 1 on, such as {tensor = 4}"


@dataclass(frozen=True, kw_only=True)
class EngineSettings(Section):
    """The step loop.

    Attributes:
      max_seqs: most sequences running at once.
      max_tokens_per_step: token budget of one step, prefill and decode together.
      chunk: largest piece of one sequence's prompt in a step; the token budget caps it too.
      max_context: most tokens of prompt and answer; None is the model's own limit.
      decode_steps: steps per device call when every sequence decodes and none waits.
      seed: determines the draws of requests that bring no seed of their own.
      overlap: of prefill and decode work within a step, on GPUs. "auto" runs each step in the fastest of several ways, by what
        steps of this model take on this machine, measured at the first start; "on" puts the attention of both into one launch
        wherever there is a kernel for it.
      layers: "scan" compiles one layer and loops, "unrolled" compiles all; "auto" picks by device and depth.
      compile_cache: folder of the persistent compilation cache; "auto" is the user's cache folder, "off" is none.
      mesh: devices that the model is spread over, such as {tensor = 4}; None is one.
    """

    section: ClassVar[str] = "engine"
    max_seqs: int = setting(64, low=1, high=65536)
    max_tokens_per_step: int = setting(512, low=1, high=2**20)
    chunk: int = setting(512, low=1, high=2**20)
    max_context: int | None = setting(None, low=2, answers=True)
    decode_steps: int = setting(8, low=1, high=1024)
    seed: int = setting(0, low=-(2**63) + 1, high=2**63 - 1, answers=True)
    overlap: str = setting("off", choices=("off", "on", "auto"))
    layers: str = setting("auto", choices=("auto", "scan", "unrolled"))
    compile_cache: str = setting("auto")
    mesh: MeshShape | dict | None = setting(None, check=mesh_problem)  # noqa: RUF009

    def __post_init__(self):
        super().__post_init__()
        if isinstance(self.mesh, dict):
            object.__setattr__(self, "mesh", MeshShape(**self.mesh))

    @property
    def prefill_chunk(self) -> int:
        return min(self.chunk, self.max_tokens_per_step)


@dataclass(frozen=True, kw_only=True)
class SparsitySettings(Section):
    """Quest page sparsity (arXiv 2406.10774): a generated token attends only to the pages that can matter to it.

    Attributes:
      token_budget: tokens that a generated token attends to, a multiple of cache.page_size; 0 attends to all.
      mode: "shared" is ours: the query heads of a KV head choose together, and the first and last pages are always in. "paper"
        and "kernel" follow the authors' accuracy code and CUDA code.
      first_pages, last_pages: always chosen by "shared".
      dense_below: contexts up to so many tokens are attended to as a whole ("shared").
      dense_layers: layers from the first that attend to everything.
      top_p: below 1, attend to fewer tokens where those hold this share of the estimated weight ("shared").
      spread: 1 ranks pages by their bounds; below, by an estimate that lies so far from the middle of the page's keys
        towards them ("shared").
      bounds: type of the pages' bounds; "auto" is bfloat16 for "shared", "int8" takes half as many bytes. Both are
        rounded outward, so they still bound.
      reuse_steps: a choice serves for so many tokens; only the last pages follow the text at once ("shared").
      prompt_tail: tokens at the end of a prompt that choose pages as generated ones do, each in a step of its own.
    """

    section: ClassVar[str] = "sparsity"
    token_budget: int = setting(0, low=0, answers=True)
    mode: str = setting("shared", choices=("shared", "paper", "kernel"), answers=True)
    first_pages: int = setting(1, low=0, answers=True)
    last_pages: int = setting(2, low=1, answers=True)
    dense_below: int = setting(0, low=0, answers=True)
    dense_layers: int = setting(2, low=0, answers=True)
    top_p: float = setting(1.0, low=0, high=1, answers=True)
    spread: float = setting(1.0, low=0, high=1, answers=True)
    bounds: str = setting("auto", choices=("auto", "bfloat16", "int8"), answers=True)
    reuse_steps: int = setting(1, low=1, answers=True)
    prompt_tail: int = setting(0, low=0, answers=True)


@dataclass(frozen=True, kw_only=True)
class QuantizationSettings(Section):
    """Low-bit weights. `mode` says what a run expects of its model; the rest is for jaxinfer-convert, which stores it with
    the model, and None is the mode's own value, see `jaxinfer.quant.form.Quantization`.

    Attributes:
      mode: run only a model that was quantized so; empty runs any.
      group: input channels that share a weight scale; 0 is all of them.
      rows: output channels that share it.
      outliers: input channels kept in `outlier_bits`.
      reorder: sort input channels by `statistic` ("squares" or "mean").
      rotate: turn inputs by a Hadamard matrix instead of keeping outliers apart.
      smooth_keys: make the channels of keys alike in size, for a cache of 4 bits.
      activation_clip, weight_clip: share of the largest magnitude that a scale covers; a weight_clip of 0 is searched.
      method: "gptq", or "rtn": round to nearest.
      damping: of GPTQ's Hessian, as a share of its mean diagonal.
      samples, length, seed: windows of calibration text, tokens of each, and the seed that draws them.
    """

    section: ClassVar[str] = "quantization"
    mode: str = setting("", choices=("", "none", "atom-w4a4", "atom-w4a8", "w8a8", "w4a16"))
    group: int | None = setting(None, low=0)
    rows: int | None = setting(None, low=1, high=2)
    outliers: int | None = setting(None, low=0)
    outlier_bits: int | None = setting(None, choices=(8, 16))
    reorder: bool | None = setting(None)
    statistic: str | None = setting(None, choices=("squares", "mean"))
    rotate: bool | None = setting(None)
    smooth_keys: bool | None = setting(None)
    activation_clip: float | None = setting(None, low=0, high=1)
    weight_clip: float | None = setting(None, low=0, high=1)
    method: str | None = setting(None, choices=("gptq", "rtn"))
    damping: float | None = setting(None, low=0, high=1)
    samples: int | None = setting(None, low=1)
    length: int | None = setting(None, low=2)
    seed: int | None = setting(None, low=0)

    @property
    def chosen(self) -> dict[str, Any]:
        """What was set beside the mode."""
        values = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if name != "mode" and value is not None}


@dataclass(frozen=True, kw_only=True)
class OffloadSettings(Section):
    """Experts on the host, for mixture-of-experts models that are larger than the device (Fiddler, arXiv 2402.07033).

    Attributes:
      device_memory: what the model may take of the device, all in all: a share of what is free in (0, 1], or a size
        ("24GiB"). Beside everything else as many experts live there as fit; the others stay on the host. None puts all
        on the device, as if there were no such section.
      policy: who computes an expert that is not on the device. "balanced" is ours: host, link and device end together.
        "fiddler" is the paper's Algorithm 1, "stream" brings every expert to the device, "host" none.
      rule: how many experts the device gets. "exact" counts everything else first, "paper" is Fiddler's 0.95 rule.
      placement: which ones: "popularity" (the most visited of all layers), "by_layer" (as many of each layer) or
        "whole_layers" (the first layers, as llama.cpp splits a model).
      popularity: JSON file of how often each expert is visited, as `python -m jaxinfer.popularity` measures it on a text;
        empty takes all for equal.
      adaptive: experts that the running work asks for take the places of others.
      landing_slots: slots for experts that are brought for later, such as those that the next layer will ask for; what
        is streamed for the layer at hand has two places of its own.
      experts: how the experts are held. "stored" as the model runs, "int8" and "int4" rounded to nearest in groups of
        128. Those of a model converted with --quant w4a16 keep their codes.
      threads: of the host's work; None for all cores.
      folder: for the experts as the host maps them, written at the first use; "auto" is the user's cache folder.
    """

    section: ClassVar[str] = "offload"
    device_memory: float | str | None = setting(None, check=memory_problem)
    policy: str = setting("balanced", choices=("balanced", "fiddler", "stream", "host"))
    rule: str = setting("exact", choices=("exact", "paper"))
    placement: str = setting("popularity", choices=("popularity", "by_layer", "whole_layers"))
    popularity: str = setting("")
    adaptive: bool = setting(True)
    landing_slots: int = setting(2, low=1, high=65536)
    experts: str = setting("stored", choices=("stored", "int8", "int4"), answers=True)
    threads: int | None = setting(None, low=1, high=64)
    folder: str = setting("auto")


@dataclass(frozen=True, kw_only=True)
class ScheduleSettings(Section):
    """In which order requests are admitted.

    Attributes:
      policy: "fcfs" admits them as they come, "random" in random order; "longest-prefix" prefers, of those that wait, the one
        with the longest prefix in the cache; "dfs" takes depth-first order of the prefix tree, so that prompts with a common
        prefix follow each other and a small pool finds it again; "blend" plans the batch by compute and memory demand
        (BlendServe): prefixes stay together, and every step mixes prefill-heavy with decode-heavy requests. Plans are made for
        batch files; other calls come as they come.
    """

    section: ClassVar[str] = "schedule"
    policy: str = setting("fcfs", choices=("fcfs", "random", "longest-prefix", "dfs", "blend"))


@dataclass(frozen=True, kw_only=True)
class ScaleoutSettings(Section):
    """Workers on a Ray cluster, see `jaxinfer-batch --ray`.

    Attributes:
      workers: processes with an engine each; None is one for each GPU, or one a machine where there are none.
      gpus: that each of them takes; None is one for each device of engine.mesh where the cluster has any.
      cpus: that each of them takes of what Ray counts.
      units: pieces that the batch is cut into, for each worker.
      start_seconds: a worker that has not loaded its model by then has failed.
      silence_seconds: one that has not answered for so long has failed.
    """

    section: ClassVar[str] = "scaleout"
    workers: int | None = setting(None, low=1, high=65536)
    gpus: float | None = setting(None, low=0, high=64)
    cpus: float = setting(1.0, low=0.01, high=1024)
    units: int = setting(4, low=4, high=1024)
    start_seconds: float = setting(1800.0, low=1, high=86400)
    silence_seconds: float = setting(600.0, low=1, high=86400)


@dataclass(frozen=True, kw_only=True)
class BatchSettings(Section):
    """The batch command.

    Attributes:
      order: of output rows: "completion" writes them as they finish, "input" as they were read. Under "input" a row
        that waits for an earlier one is not yet safe: after a kill it is done again.
      max_line_bytes: longest input line; a longer one becomes an error row without being held in memory.
      reorder_bytes: memory for rows that wait for an earlier one under "input" order; the rest waits on disk.
      spool: folder for the tokenized requests while they wait; empty is the output's folder.
      flush_seconds: finished rows reach the operating system this often.
      sync_seconds: and the disk itself (fsync) this often.
      created: fixed Unix time for the `created` field of answers; None is the time of writing.
    """

    section: ClassVar[str] = "batch"
    order: str = setting("completion", choices=("completion", "input"))
    max_line_bytes: int = setting(64 * 2**20, low=1024, high=2**31)
    reorder_bytes: int = setting(64 * 2**20, low=0)
    spool: str = setting("")
    flush_seconds: float = setting(0.2, low=0, high=3600)
    sync_seconds: float = setting(5.0, low=0, high=3600)
    created: int | None = setting(None, low=0)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything that can be set. Immutable; `dataclasses.replace` makes variants."""

    model: ModelSettings = field(default_factory=ModelSettings)
    cache: CacheSettings = field(default_factory=CacheSettings)
    engine: EngineSettings = field(default_factory=EngineSettings)
    sparsity: SparsitySettings = field(default_factory=SparsitySettings)
    quantization: QuantizationSettings = field(default_factory=QuantizationSettings)
    offload: OffloadSettings = field(default_factory=OffloadSettings)
    schedule: ScheduleSettings = field(default_factory=ScheduleSettings)
    scaleout: ScaleoutSettings = field(default_factory=ScaleoutSettings)
    batch: BatchSettings = field(default_factory=BatchSettings)

    @property
    def answers_fingerprint(self) -> str:
        """Hash of the settings on which generated tokens depend: 16 hex digits. Fields at their default do not
        enter, so a field added by a later version keeps old outputs resumable."""
        chosen = {}
        for part in dataclasses.fields(self):
            section = getattr(self, part.name)
            for item in dataclasses.fields(section):
                value = getattr(section, item.name)
                if item.metadata["answers"] and value != item.default:
                    chosen[f"{part.name}.{item.name}"] = value
        return hashlib.blake2b(json.dumps(chosen, sort_keys=True).encode(), digest_size=8).hexdigest()


_SECTIONS: dict[str, type[Section]] = typing.get_type_hints(Settings)


def load_config(path: str | os.PathLike | None = None, overrides: Iterable[str] = ()) -> Settings:
    """Settings from a TOML file (None: the defaults) with `section.key=value` overrides on top, the last one winning.

    Raises:
      ConfigError: naming the file or override, section.key, the value, and what is accepted.
    """
    values: dict[str, dict[str, Any]] = {name: {} for name in _SECTIONS}
    if path is not None:
        for section, table in _read_toml(path).items():
            kind = _lookup_section(section, str(path))
            if not isinstance(table, dict):
                raise ConfigError(f"{path}: {section} = {table!r}: expected a table, [{section}]")
            for key, value in table.items():
                values[section][key] = _checked(kind, key, value, str(path))
    for text in overrides:
        section, key, raw = _split_override(text)
        kind = _lookup_section(section, f"--set {text}")
        values[section][key] = _checked(kind, key, _parse_value(kind, key, raw), f"--set {text}")
    sections: dict[str, Any] = {name: _SECTIONS[name](**given) for name, given in values.items()}
    return Settings(**sections)


def _checked(kind: type[Section], key: str, value: Any, origin: str) -> Any:
    try:
        kind.check(key, value)
    except ConfigError as error:
        raise ConfigError(f"{origin}: {error}") from None
    return value


def _lookup_section(name: str, origin: str) -> type[Section]:
    if name not in _SECTIONS:
        raise ConfigError(
            f"{origin}: no section {name!r}{close_match(name, _SECTIONS)}; there are {', '.join(_SECTIONS)}"
        )
    return _SECTIONS[name]


def _read_toml(path: str | os.PathLike) -> dict[str, Any]:
    try:
        with open(path, "rb") as file:
            return tomllib.load(file)
    except OSError as error:
        raise ConfigError(f"{path}: cannot read this config file: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{path}: not a TOML file: {error}") from None


def _split_override(text: str) -> tuple[str, str, str]:
    name, equals, raw = text.partition("=")
    section, dot, key = name.strip().partition(".")
    if not (equals and dot and section and key):
        raise ConfigError(f"--set {text}: expected section.key=value, such as engine.max_seqs=32")
    return section, key, raw.strip()


def _parse_value(kind: type[Section], key: str, raw: str) -> Any:
    """A TOML value; a bare word is a string, and so is anything for a key that only holds strings."""
    try:
        parsed = tomllib.loads(f"value = {raw}")
    except (tomllib.TOMLDecodeError, RecursionError):
        return raw
    value = parsed["value"] if len(parsed) == 1 else raw
    return raw if types_of(kind).get(key) == (str,) and not isinstance(value, str) else value
