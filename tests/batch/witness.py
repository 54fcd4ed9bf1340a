"""The batch command on the embedded model, as a process of its own that keeps a log of its work: witness.py LOG ARGUMENTS...

A line of the log is a JSON array, handed to the operating system before what it tells of has any effect:
  [time, "loaded"]                               the model is ready
  [time, "work", [[id, choice, tokens], ...]]    a device call is about to compute these tokens of these choices
  [time, "done", id]                             the engine hands this answer over, to be written; "refused" if an error
"""

import dataclasses
import json
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from jaxinfer import LLM
from jaxinfer.batch.cli import main


class Log:
    """Appends events; none is lost when the process is killed."""

    def __init__(self, path):
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def add(self, *event):
        line = json.dumps([time.monotonic(), *event]).encode() + b"\n"
        assert os.write(self._descriptor, line) == len(line)


def watched_llm(settings, log):
    exact = dataclasses.replace(settings.model, dtype="float32")  # in bfloat16 batches may differ by ties
    llm = LLM(config=dataclasses.replace(settings, model=exact))
    launch, stream = llm.engine.device.launch, llm.stream

    def logged_launch(plan):
        chunks = [(c.sequence.request.id, c.sequence.choice, c.count) for c in plan.decodes + plan.prefills]
        log.add("work", chunks)
        return launch(plan)

    def logged_stream(requests):
        for completion in stream(requests):
            log.add("refused" if completion.error else "done", completion.request_id)
            yield completion

    llm.engine.device.launch, llm.stream = logged_launch, logged_stream
    log.add("loaded")
    return llm


if __name__ == "__main__":
    log = Log(sys.argv[1])
    sys.exit(main(sys.argv[2:], load_model=lambda settings: watched_llm(settings, log)))
