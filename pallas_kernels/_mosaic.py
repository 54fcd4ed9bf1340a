"""The seam to Mosaic GPU: which device is there, and stand-ins for what the simulator on the CPU cannot run.

All kernels for Hopper go through here, so that a change of this young interface is met in one place.
"""

import contextlib
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, memref

HOPPER = ("H100", "H200", "H20", "GH200", "H800")
SIMULATED_PROCESSORS = 4

_simulating = False


@contextlib.contextmanager
def simulator() -> Iterator[None]:
    """Mosaic kernels traced inside run on the CPU, slowly, with races between threads and copies looked for.

    Raises AssertionError for a race.
    """
    from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call as interpreter

    global _simulating
    interpreter.reset_gpu_interpret_mode_state()
    _simulating = True
    try:
        with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
            yield
        races = interpreter.get_races()
        assert races is None or not races.races_found, "a race"
    finally:
        _simulating = False
        interpreter.reset_gpu_interpret_mode_state()


def processors() -> int:
    """Streaming multiprocessors of the device that is traced for. Raises NotImplementedError where it is no Hopper."""
    if _simulating:
        return SIMULATED_PROCESSORS
    abstract, real = jax.sharding.get_abstract_mesh().abstract_device, jax.devices()[0]
    if abstract is not None and abstract.num_cores:
        kind, count = abstract.device_kind, abstract.num_cores
    else:
        kind, count = real.device_kind, getattr(real, "core_count", 0)
    if not count or not any(name in kind for name in HOPPER):
        raise NotImplementedError(f"device {kind}; {', '.join(HOPPER)}")
    return count


def swizzled(columns: int) -> tuple:
    """How shared memory holds a bfloat16 matrix of so many columns as an operand of the tensor cores."""
    tile = min(columns, 64)
    # mypy takes an empty method of the base class for an abstract one.
    return plgpu.TilingTransform((8, tile)), plgpu.SwizzleTransform(2 * tile)  # type: ignore[abstract]


def mma(total: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """total + a @ b by mma.sync, all in registers."""
    if _simulating:
        return total + jnp.dot(a, b, preferred_element_type=total.dtype)
    return plgpu.mma(total, a, b)


def wgmma_from_registers(total, a: jax.Array, b, stage) -> None:
    """total (an ACC reference) += a @ b with a in registers; `stage` comes from stage_types."""
    if _simulating:
        (copy,) = stage
        copy[...] = a
        plgpu.commit_smem()
        a = copy
    plgpu.wgmma(total, a, b)


def accumulate(multiply: Callable, total: jax.Array) -> jax.Array:
    """total plus what `multiply`, given an ACC reference, adds to it by wgmma."""
    if not _simulating:
        return pl.run_state(multiply)(plgpu.ACC.init(total))

    def alone(part):
        multiply(part)
        return part[...]

    rows, columns = total.shape
    return total + pl.run_scoped(alone, plgpu.ACC((rows, columns), total.dtype))


def stage_types(shape: tuple[int, ...], dtype) -> tuple:
    """Scratch where the simulator keeps the a of wgmma_from_registers; nothing on a device."""
    return (plgpu.SMEM(shape, dtype),) if _simulating else ()


def gather(ref, index: jax.Array, layout) -> jax.Array:
    """The elements of ref that `index` numbers, row after row; index lies in registers as `layout` says.

    ref [size], or [rows, columns] with columns a power of two, in global or shared memory.
    """
    if _simulating:
        return ref[...].reshape(-1)[index]
    dtype, columns = ref.dtype, ref.shape[-1] if len(ref.shape) == 2 else 0
    signed = None if jnp.issubdtype(dtype, jnp.floating) else not jnp.issubdtype(dtype, jnp.unsignedinteger)
    kind = plgpu.ShapeDtypeStruct(index.shape, dtype, layout=layout)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), layout), return_type=kind)
    def one_by_one(_, ref, index):
        def load(at, _):
            where = [at]
            if columns:
                shift, mask = (mgpu.c(n, at.type) for n in (columns.bit_length() - 1, columns - 1))
                where = [arith.shrui(at, shift), arith.andi(at, mask)]
            return memref.load(ref, [arith.index_cast(ir.IndexType.get(), part) for part in where])

        return index.foreach(load, create_array=True, is_signed=signed)

    return one_by_one(ref, index)


def put(ref, value: jax.Array, layout) -> None:
    """Writes to shared memory that is laid out row by row, where inference would want tiles."""
    if _simulating:
        ref[...] = value
        return

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), layout))
    def store(_, ref, value):
        value.store_untiled(ref, optimized=False)

    store(ref, value)


__all__ = [
    "accumulate",
    "gather",
    "mma",
    "pl",
    "plgpu",
    "processors",
    "put",
    "simulator",
    "stage_types",
    "swizzled",
    "wgmma_from_registers",
]
