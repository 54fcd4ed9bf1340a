"""Compiles one case in this process: python -m pallas_kernels._h200.compile NAME; prints bytes of temporary memory."""

import sys
from pathlib import Path

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pallas_kernels._h200.cases import CASES, Case

TARGET = Path(__file__).with_name("target.txtpb")


def h200() -> Mesh:
    """One H200 that is not there: what is lowered for it compiles, and cannot run. Needs JAX's CUDA plugin."""
    topology = topologies.get_topology_desc(
        topology_name="h200", platform="cuda", topology="1x1x1", target_config=TARGET.read_text()
    )
    return Mesh(np.array(topology.devices).reshape(1), ("x",))


def compile_case(case: Case) -> int:
    mesh = h200()
    sharding = NamedSharding(mesh, PartitionSpec())
    arguments = [
        jax.ShapeDtypeStruct(shape, np.dtype(dtype), sharding=sharding) for shape, dtype in case.arguments
    ]
    program = jax.jit(case.run, out_shardings=sharding, donate_argnums=tuple(range(case.in_place)))
    # The abstract mesh tells kernels which device they are traced for.
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        compiled = program.trace(*arguments).lower().compile()
    memory = compiled.memory_analysis()
    size = sum(np.prod(a.shape) * a.dtype.itemsize for a in arguments[: case.in_place])
    if case.in_place and (memory.alias_size_in_bytes < size or memory.temp_size_in_bytes > size / 2):
        raise SystemExit(f"not in place: {memory.temp_size_in_bytes} temporary bytes beside {size}")
    return memory.temp_size_in_bytes


if __name__ == "__main__":
    print(compile_case(CASES[sys.argv[1]]))
