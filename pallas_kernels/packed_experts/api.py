"""Public face of packed_experts."""

import jax

from pallas_kernels._dispatch import dispatch
from pallas_kernels.packed_experts import xla
from pallas_kernels.packed_experts.layout import Record


def packed_experts(
    x: jax.Array,
    records: jax.Array,
    expert_ids: jax.Array,
    expert_weights: jax.Array,
    *,
    record: Record,
    activation: str = "silu",
    implementation: str | None = None,
) -> jax.Array:
    """`expert_mlp` with each expert's weights in a record: y[t] = sum over k of w[t, k] * expert ids[t, k] of x[t].

    x: [T, D]
    records: uint8 [E, record.nbytes], see `layout`
    expert_ids: int32 [T, K]; a negative id skips the pair
    expert_weights: float32 [T, K]
    activation: "silu" or "gelu_tanh"
    returns [T, D] in x.dtype; float32 accumulation, the K experts summed in the order of expert_ids
    """
    implementations = {"cpu": _cpu, "xla": xla.packed_experts}
    args = (x, records, expert_ids, expert_weights)
    return dispatch(
        "packed_experts", implementations, implementation, *args, record=record, activation=activation
    )


def _cpu(*args, **kwargs):
    from pallas_kernels.packed_experts import cpu

    return cpu.packed_experts(*args, **kwargs)
