"""Batches on a Ray cluster: `jaxinfer-batch --ray`, and the same for a `ray.data.Dataset`."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator
from itertools import batched
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxinfer.batch import parquet
from jaxinfer.batch.interruption import Interruption
from jaxinfer.batch.journal import OutputFile
from jaxinfer.batch.runner import BatchRun
from jaxinfer.batch.source import Line
from jaxinfer.batch.spool import spool_folder
from jaxinfer.batch.tally import Tally
from jaxinfer.config import Settings
from jaxinfer.errors import ConfigError
from jaxinfer.scaleout.cluster import LOCAL, require_ray
from jaxinfer.scaleout.fleet import Fleet, Front

if TYPE_CHECKING:
    from ray.data import Dataset

_ROWS = 4096  # read at a time


def planned(settings: Settings) -> Settings:
    """The settings of a run on several workers: the whole batch is planned, and the model is named from the root on."""
    path = settings.model.path
    model = dataclasses.replace(settings.model, path=os.path.abspath(path) if path else path)
    return dataclasses.replace(
        settings, model=model, schedule=dataclasses.replace(settings.schedule, policy="blend")
    )


def connect(settings: Settings, address: str = LOCAL) -> Fleet:
    """Workers on the cluster at `address`, each with the model loaded and checked to be this one.

    Raises:
      JaxInferError: see `Fleet`.
    """
    require_ray()
    from jaxinfer.llm import EMBEDDED_MODEL
    from jaxinfer.models.manifest import read_manifest
    from jaxinfer.models.tokenizer import Tokenizer, has_tokenizer

    folder = Path(settings.model.path or EMBEDDED_MODEL)
    manifest = read_manifest(folder)
    tokenizer = Tokenizer(folder) if has_tokenizer(folder) else None
    return Fleet(Front(tokenizer, folder.resolve().name, manifest.fingerprint), settings, address)


def answer(
    dataset: Dataset,
    output: str | os.PathLike,
    *,
    config: Settings | None = None,
    address: str = LOCAL,
    connect: Callable[[Settings, str], Fleet] = connect,
) -> Dataset:
    """Answers every row of a dataset, as `jaxinfer-batch --ray` does those of a file.

    Args:
      dataset: with the columns of a batch row, `custom_id`, `url`, `body` (JSON text or a struct).
      output: file of this machine to which rows are written as they finish; one that holds rows of an earlier call is gone
        on with.
      config: settings, `model.path` among them.
      address: of the cluster, if this process has not joined one.

    Returns:
      a dataset with `id`, `custom_id`, and `response` and `error` as JSON text. Rows stand in the order in which they
      finished, or with `batch.order = "input"` as they came.

    Raises:
      ConfigError: the dataset lacks one of these columns.
      JaxInferError: nothing is lost of what was answered before; the same call goes on from there.
    """
    ray, path = require_ray(), os.fspath(output)
    columns = dataset.columns() or parquet.NEEDED  # of a dataset without rows they are not known
    if missing := [name for name in parquet.NEEDED if name not in columns]:
        raise ConfigError(
            f"the dataset lacks the column {missing[0]}; needed are {', '.join(parquet.NEEDED)}"
        )
    settings = planned(config or Settings())
    file = OutputFile(path, overwrite=False)
    fleet = None
    try:
        if settings.batch.order == "input":
            file.keep_up_to_retried()
        fleet = connect(settings, address)
        run = BatchRun(
            fleet,
            _Rows(dataset),
            settings,
            tally=Tally(),
            interruption=Interruption(),
            ignored=lambda name: None,
            spool=spool_folder(path),
        )
        run.survey(file.kept, path)
        journal = file.start(
            flush_seconds=settings.batch.flush_seconds, sync_seconds=settings.batch.sync_seconds
        )
    except BaseException:
        file.close()
        if fleet is not None:
            fleet.close()  # this process may live on, and others want the workers' places
        raise
    try:
        run.run(journal)
    finally:
        journal.close()
    with open(path, "rb") as rows:
        blocks = [ray.put(parquet.table(some)) for some in batched(rows, _ROWS)]
    return ray.data.from_arrow_refs(blocks or [ray.put(parquet.table([]))])


class _Rows:
    """The rows of a dataset as lines of a batch file."""

    def __init__(self, dataset: Dataset):
        self._dataset = dataset
        self.position = 0  # in rows; how many there are is not known

    def __iter__(self) -> Iterator[Line]:
        self.position = 0
        batches: Any = self._dataset.iter_batches(batch_size=_ROWS, batch_format="pyarrow")
        for batch in batches:
            for row in batch.to_pylist():
                self.position += 1
                yield Line("dataset", self.position, parquet.json_line(row).strip())
