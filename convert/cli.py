"""The jaxinfer-convert command."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

INTERRUPTED = 130


def main(argv: list[str] | None = None) -> int:
    """Converts a Hugging Face folder. Returns 0, 2 for wrong usage or a folder that cannot be converted, 130 if interrupted."""
    options = _parser().parse_args(argv)
    before = signal.signal(signal.SIGTERM, _interrupt)  # as Ctrl-C: what was begun is removed
    try:
        return _convert(options)
    except KeyboardInterrupt:
        return _fail(f"interrupted; nothing was written to {options.out}", INTERRUPTED)
    finally:
        signal.signal(signal.SIGTERM, before)


def _convert(options: argparse.Namespace) -> int:
    if options.quant or options.calibration:
        return _fail(
            "--quant and --calibration are not available yet; without them weights are kept as they are"
        )
    import jax

    jax.config.update(
        "jax_platforms", "cpu"
    )  # conversion needs no accelerator and must not reserve its memory
    from convert.convert import convert
    from jaxinfer.errors import ModelError
    from jaxinfer.models.tokenizer import has_tokenizer

    try:
        with _progress(options.source.name) as progress:
            manifest = convert(
                options.source,
                options.out,
                dtype=options.dtype,
                overwrite=options.overwrite,
                progress=progress,
            )
    except ModelError as error:
        return _fail(str(error))
    if not has_tokenizer(options.out):
        print(
            f"warning: {options.source} has no tokenizer: the model will serve token ids only",
            file=sys.stderr,
        )
    print(f"{options.out}: {manifest.config.family}, {manifest.dtype}, {len(manifest.parts)} parts")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="jaxinfer-convert", description="Turn a Hugging Face model folder into one that jaxinfer loads."
    )
    parser.add_argument(
        "source", type=Path, metavar="HF_FOLDER", help="folder with config.json and safetensors"
    )
    parser.add_argument("out", type=Path, metavar="OUT_FOLDER", help="folder to write; must not exist")
    parser.add_argument(
        "--dtype",
        choices=("checkpoint", "float32", "bfloat16"),
        default="checkpoint",
        help="type of the stored weights (default: the checkpoint's; float16 becomes bfloat16)",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace OUT_FOLDER if it is a converted model"
    )
    parser.add_argument("--quant", metavar="METHOD", help="not available yet")
    parser.add_argument("--calibration", metavar="TEXT", help="not available yet")
    return parser


@contextmanager
def _progress(name: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal, nothing elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        "{task.description}",
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task(name)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _interrupt(signum: int, frame: object) -> None:
    raise KeyboardInterrupt


def _fail(message: str, status: int = 2) -> int:
    print(f"jaxinfer-convert: error: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
