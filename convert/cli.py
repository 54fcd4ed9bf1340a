"""The jaxinfer-convert command."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from jaxinfer.quant.form import MODES

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
    if options.quant is None and (options.calibration or options.set):
        return _fail("--calibration and --set are for --quant; without it weights are kept as they are")
    import jax

    jax.config.update(
        "jax_platforms", "cpu"
    )  # conversion needs no accelerator and must not reserve its memory
    from convert.convert import convert
    from convert.quantize import Quantize
    from convert.report import PLOT, show
    from jaxinfer.config import load_config
    from jaxinfer.errors import ConfigError, ModelError
    from jaxinfer.models.tokenizer import has_tokenizer
    from jaxinfer.quant.calibrate import LayerReport

    reports: list[LayerReport] = []
    try:
        quantize = None
        if options.quant is not None:
            chosen = load_config(None, options.set).quantization.chosen
            quantize = Quantize(options.quant, chosen, options.calibration, reports.append)
        with _progress(options.source.name) as progress:
            manifest = convert(
                options.source,
                options.out,
                dtype=options.dtype,
                quantize=quantize,
                overwrite=options.overwrite,
                progress=progress,
            )
    except (ModelError, ConfigError) as error:
        return _fail(str(error))
    if reports:
        show(reports)
        print(f"{options.out / PLOT}: the same as a plot")
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
    parser.add_argument(
        "--quant",
        choices=MODES,
        help="quantize the linear layers; a run that was stopped goes on where it was",
    )
    parser.add_argument(
        "--calibration",
        type=Path,
        metavar="FILE",
        help="text like that which the model will read, for --quant",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="quantization.key=value",
        help="constants of the quantization",
    )
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
