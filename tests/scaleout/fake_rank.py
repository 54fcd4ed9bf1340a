"""A rank with the stand-in model, whose worker process can be made to die, and a record of what it was given."""

import os
import time
from dataclasses import dataclass
from pathlib import Path

from batch.fake import FakeLLM

from jaxinfer.scaleout.rank import Hello, package_version
from jaxinfer.schedule.cost import Cost
from jaxinfer.schedule.profile import PRACTICAL, SUM

SLOTS = 8
ALONE = 70


@dataclass(frozen=True)
class Making:
    """Makes ranks, in worker processes.

    Attributes:
      folder: every process leaves a file there, named by its id, with the requests that it was given.
      delay: seconds that an answer takes.
      dies_at: requests that end the process that is given them; "start" ends it before any.
      processes: no process answers more than `ALONE` requests before so many processes have started.
    """

    folder: str
    delay: float = 0.0
    dies_at: tuple[str, ...] = ()
    processes: int = 0
    package: str = ""
    model: str = "model-a"
    overlaps: bool = False

    def __call__(self, settings):
        if "start" in self.dies_at:
            Path(self.folder, str(os.getpid())).touch()
            os._exit(3)
        return FakeRank(self)


class FakeRank:
    def __init__(self, making):
        self._making = making
        self._model = FakeLLM(delay=making.delay)
        self._log = Path(making.folder, str(os.getpid())).open("a", buffering=1)  # noqa: SIM115 - open as long as the process lives

    def hello(self):
        joint = PRACTICAL if self._making.overlaps else SUM
        return Hello(
            package=self._making.package or package_version(),
            model=self._making.model,
            limits=FakeLLM(limit=1000),
            pool_tokens=10_000,
            cost=Cost(token_seconds=3.0, key_seconds=0.5, step_seconds=20.0, joint=joint),
            slots=SLOTS,
        )

    def serve(self, inbox):
        taken = 0
        while inbox.ready(wait=60.0):
            request = next(inbox, None)
            if request is None:
                return
            taken += 1
            if taken > ALONE:
                self._wait_for_processes()
            print(request.id, file=self._log)
            if request.id in self._making.dies_at:
                time.sleep(0.1)
                os._exit(3)
            yield from self._model.stream([request])

    def _wait_for_processes(self):
        deadline = time.monotonic() + 60
        while len(given(self._making.folder)) < self._making.processes and time.monotonic() < deadline:
            time.sleep(0.05)

    def metrics(self):
        return self._model.metrics()


def given(folder):
    """Requests that each process was given, by process id."""
    return {int(file.name): file.read_text().split() for file in Path(folder).iterdir()}
