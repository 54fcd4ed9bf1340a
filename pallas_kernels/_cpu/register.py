"""Compiles a handler and registers it with XLA, once per process."""

import hashlib
import importlib
import re
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from types import FunctionType
from typing import Any

import jax

# XLA_FFI_API_MAJOR of the header whose structs `frame` and `threads` read.
API_MAJOR = 0

_lock = threading.Lock()
_registered: dict[str, Any] = {}


def register(name: str, module: str, handler: str = "handler", tiles: Iterable[str] = ()) -> str:
    """Makes `handler` of `module`, a function of one call frame, callable as `name` through jax.ffi.ffi_call.

    tiles: the dtypes of the register tiles that it calls. Returns the name. Raises NotImplementedError where numba is missing or XLA's interface is not the one we know.
    """
    with _lock:
        if name not in _registered:
            _check_interface()
            try:
                from numba import types

                from pallas_kernels._cpu.tiles import publish

                native = importlib.import_module(module)
            except ImportError as error:
                raise NotImplementedError(f"numba cannot be imported ({error})") from None
            for dtype in tiles:
                publish(dtype)
            # Compiled code must outlive every executable that names it, hence kept.
            compiled = compile_function(getattr(native, handler), types.intp(types.intp))
            jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(compiled.ctypes), platform="cpu")
            _registered[name] = compiled
    return name


def compile_function(function: Callable, signature: Any) -> Any:
    """function as a C function, from numba's cache where there is one.

    numba's cache looks at the file of the function alone and would miss changes in what that imports, hence a name
    for each state of our sources.
    """
    import numba

    named = FunctionType(function.__code__, function.__globals__, function.__name__)
    named.__qualname__ = f"{function.__name__}_{_VERSION}"
    try:
        return numba.cfunc(signature, cache=True, error_model="numpy")(named)
    except (RuntimeError, OSError):
        # No writable cache folder: compile anew in each process.
        return numba.cfunc(signature, error_model="numpy")(named)


def _sources_hash() -> str:
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).resolve().parents[1].glob("*/*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


# Read when this module is, so that it names the sources that are running and not later ones.
_VERSION = _sources_hash()


def _check_interface() -> None:
    header = Path(jax.ffi.include_dir()) / "xla/ffi/api/c_api.h"
    found = re.search(r"define XLA_FFI_API_MAJOR (\d+)", header.read_text()) if header.exists() else None
    if found is None or int(found[1]) != API_MAJOR:
        version = found[1] if found else "unknown"
        raise NotImplementedError(f"XLA's FFI has API major version {version}, the kernels know {API_MAJOR}")
