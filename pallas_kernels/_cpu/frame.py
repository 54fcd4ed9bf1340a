"""Reads XLA's call frame (xla/ffi/api/c_api.h, API major version 0) by offset.

Offsets in bytes on a 64-bit machine, from the structs of that header:
XLA_FFI_CallFrame: extension_start 8, api 16, ctx 24, args 40, rets 80; XLA_FFI_Args / Rets: values 32;
XLA_FFI_Buffer: data 24, dims 40; XLA_FFI_Api: api_version 16 (major 16, minor 20 inside), functions from 48.
"""

from pallas_kernels._cpu.memory import jit, load_i32, load_i64, store_i32, store_i64
from pallas_kernels._cpu.register import API_MAJOR

METADATA_EXTENSION = 1


@jit
def frame_api(frame):
    return load_i64(frame + 16)


@jit
def frame_context(frame):
    return load_i64(frame + 24)


@jit
def _argument_buffer(frame, index):
    return load_i64(load_i64(frame + 40 + 32) + 8 * index)


@jit
def argument(frame, index):
    """Address of the data of an argument."""
    return load_i64(_argument_buffer(frame, index) + 24)


@jit
def dimension(frame, index, axis):
    """Size of one axis of an argument."""
    return load_i64(load_i64(_argument_buffer(frame, index) + 40) + 8 * axis)


@jit
def result(frame, index):
    """Address of the data of a result."""
    return load_i64(load_i64(load_i64(frame + 80 + 32) + 8 * index) + 24)


@jit
def result_dimension(frame, index, axis):
    return load_i64(load_i64(load_i64(load_i64(frame + 80 + 32) + 8 * index) + 40) + 8 * axis)


@jit
def answers_metadata(frame):
    """True where XLA asks, at registration, which API version we speak; the answer is then filled in."""
    extension = load_i64(frame + 8)
    if extension == 0 or load_i32(extension + 8) != METADATA_EXTENSION:
        return False
    # XLA_FFI_Metadata: api_version at 8 (struct_size, extension_start, major, minor), traits 32, state_type_id 40.
    metadata = load_i64(extension + 24)
    api = load_i64(frame + 16)
    store_i64(metadata + 8, 24)
    store_i64(metadata + 16, 0)
    store_i32(metadata + 24, API_MAJOR)
    store_i32(metadata + 28, load_i32(api + 36) if api != 0 else 0)
    store_i32(metadata + 32, 0)
    if load_i64(metadata) >= 48:
        store_i64(metadata + 40, 0)
    return True
