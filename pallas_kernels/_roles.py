"""What the blocks of a Hopper kernel do: one role is a kernel of its own, two can share a launch."""

import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels._mosaic import pl, plgpu, processors


@dataclass(frozen=True, kw_only=True)
class Role:
    """A grid of blocks of one warpgroup each.

    Attributes:
      grid: blocks along each axis; the last one runs fastest.
      body: takes the index along each axis, references to inputs and outputs, and the scratch by name.
      inputs: arrays.
      outputs: their shapes and dtypes.
      scratch: types of shared memory and barriers, by name.
      finish: makes the result of the outputs.
    """

    grid: tuple[int, ...]
    body: Callable[..., None]
    inputs: tuple[jax.Array, ...]
    outputs: tuple[jax.ShapeDtypeStruct, ...]
    scratch: dict
    finish: Callable[..., jax.Array]

    @property
    def blocks(self) -> int:
        return math.prod(self.grid)


def launch(role: Role, name: str) -> jax.Array:
    """The result of the role as a kernel of its own."""
    axes = tuple(f"axis_{i}" for i in range(len(role.grid)))

    def body(*refs, **scratch):
        role.body(*(lax.axis_index(axis) for axis in axes), *refs, **scratch)

    kernel = plgpu.kernel(
        body,
        out_type=role.outputs,
        grid=role.grid,
        grid_names=axes,
        kernel_name=name,
        scratch_types=role.scratch,
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )
    return role.finish(*kernel(*role.inputs))


def launch_together(
    first: Role, second: Role, live: jax.Array | int, name: str, pace: float
) -> tuple[jax.Array, jax.Array]:
    """Results of two roles in one grid, the first bound by compute, the second by memory.

    A block's role follows from its index. A period of the index has as many blocks of the first as the device has processors,
    then blocks of the second, so many that both kinds last to the last period. A processor that holds two blocks begins with
    one of each kind; whichever ends makes room for the next index.

    Args:
      live: int32, how many blocks of the first have work; they are its first ones.
      pace: the second's blocks are handed out so many times as fast as would spread them evenly.

    Raises:
      ValueError: a pace below 1.
    """
    if pace < 1:
        raise ValueError(f"{name}: pace {pace}; 1 or more")
    group, share = processors(), math.ceil(second.blocks * pace)
    # Periods and their lengths follow from `live`; there are never more blocks than these.
    blocks = max(1, -(-first.blocks // group)) * (group + 1) + share
    references = len(first.inputs), len(second.inputs), len(first.outputs), len(second.outputs)

    def body(live, *refs):
        rest = iter(refs)
        inputs, more_inputs, outputs, more_outputs = (list(itertools.islice(rest, n)) for n in references)
        block = lax.axis_index("block")
        periods = jnp.maximum((live[0] + group - 1) // group, 1)
        each = (share + periods - 1) // periods
        period, place = block // (group + each), lax.rem(block, group + each)
        one, other = period * group + place, period * each + place - group
        is_first, has_first, has_second = place < group, one < live[0], other < second.blocks

        def run_first():
            pl.when(has_first)(lambda: _run(first, one, inputs + outputs))

        def run_second():
            pl.when(has_second)(lambda: _run(second, other, more_inputs + more_outputs))

        lax.cond(is_first, run_first, run_second)

    kernel = plgpu.kernel(
        body,
        out_type=(*first.outputs, *second.outputs),
        grid=(blocks,),
        grid_names=("block",),
        kernel_name=name,
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )
    out = kernel(jnp.reshape(jnp.asarray(live, jnp.int32), (1,)), *first.inputs, *second.inputs)
    return first.finish(*out[: len(first.outputs)]), second.finish(*out[len(first.outputs) :])


def numbered(grid: tuple[int, ...], number: jax.Array) -> list[jax.Array]:
    """The index of a block along each axis."""
    index: list[jax.Array] = []
    for size in reversed(grid):
        index.insert(0, lax.rem(number, size))
        number = number // size
    return index


def _run(role: Role, number: jax.Array, references: list) -> None:
    """The block of that number; its scratch lives no longer, so the roles share the memory."""
    index = numbered(role.grid, number)
    pl.run_scoped(functools.partial(role.body, *index, *references), **role.scratch)
