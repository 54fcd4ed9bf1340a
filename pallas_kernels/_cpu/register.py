"""Compiles a handler and registers it with XLA, once per process."""

import hashlib
import importlib
import inspect
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

# XLA_FFI_API_MAJOR of the header whose structs `frame` and `threads` read.
API_MAJOR = 0

_lock = threading.Lock()
_registered: dict[str, Any] = {}


def register(name: str, module: str, factory: str = "handler") -> str:
    """Makes `name` callable through jax.ffi.ffi_call and returns it.

    factory(version) in `module` gives the numba function of one call frame, see compile_function.
    Raises NotImplementedError where numba is missing or XLA's interface is not the one we know.
    """
    with _lock:
        if name not in _registered:
            _check_interface()
            try:
                from numba import types

                native = importlib.import_module(module)
            except ImportError as error:
                raise NotImplementedError(f"numba cannot be imported ({error})") from None
            # Compiled code must outlive every executable that names it, hence kept.
            compiled = compile_function(getattr(native, factory), types.intp(types.intp))
            jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(compiled.ctypes), platform="cpu")
            _registered[name] = compiled
    return name


def compile_function(factory: Callable[[int], Callable], signature: Any) -> Any:
    """factory(version) as a C function, from numba's cache where there is one.

    The function must mention `version`, the hash of our sources: the cache looks at the file of the function alone
    and would miss changes in what it imports.
    """
    import numba

    function = factory(_sources_hash(Path(inspect.getfile(factory)).parent))
    try:
        return numba.cfunc(signature, cache=True, error_model="numpy")(function)
    except (RuntimeError, OSError):
        # No writable cache folder: compile anew in each process.
        return numba.cfunc(signature, error_model="numpy")(function)


def _sources_hash(folder: Path) -> int:
    """Of the kernel's own folder and of this one, which all kernels import."""
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("*.py"), *Path(__file__).parent.glob("*.py")]):
        digest.update(path.read_bytes())
    return int.from_bytes(digest.digest()[:7])


def _check_interface() -> None:
    header = Path(jax.ffi.include_dir()) / "xla/ffi/api/c_api.h"
    found = re.search(r"define XLA_FFI_API_MAJOR (\d+)", header.read_text()) if header.exists() else None
    if found is None or int(found[1]) != API_MAJOR:
        version = found[1] if found else "unknown"
        raise NotImplementedError(f"XLA's FFI has API major version {version}, the kernels know {API_MAJOR}")
