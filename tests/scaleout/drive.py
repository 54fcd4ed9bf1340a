"""A driver in a process of its own, with the stand-in model: `drive.py FOLDER DELAY [jaxinfer-batch's options]`."""

import os
import sys
from pathlib import Path

sys.path[1:1] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]
os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)  # workers find this folder's modules


def drive(folder, delay, *options):
    from batch.fake import FakeTokenizer
    from fake_rank import Making

    from jaxinfer.batch.cli import main
    from jaxinfer.scaleout import ray as scaleout
    from jaxinfer.scaleout.fleet import Fleet, Front

    def connect(settings, address):
        making = Making(str(Path(folder, "log")), delay=float(delay))
        return Fleet(Front(FakeTokenizer(), "fake", "model-a"), settings, address, making)

    scaleout.connect = connect
    return main(["--set", "scaleout.workers=2", "--set", "batch.created=1", *options])


if __name__ == "__main__":
    sys.exit(drive(*sys.argv[1:]))
