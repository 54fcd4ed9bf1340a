"""What the blocks of a Hopper kernel do: one role is a kernel of its own, two can share a launch (`hybrid_attention`)."""

from collections.abc import Callable
from dataclasses import dataclass

import jax
from jax import lax

from pallas_kernels._mosaic import plgpu


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
