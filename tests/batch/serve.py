"""The batch command with the stand-in model, as a process of its own: serve.py DELAY ARGUMENTS..."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from jaxinfer.batch.cli import main
from tests.batch.fake import FakeLLM

if __name__ == "__main__":
    sys.exit(main(sys.argv[2:], load_model=lambda settings: FakeLLM(delay=float(sys.argv[1]))))
