"""Public face of expert_mlp."""

import jax

from pallas_kernels._dispatch import dispatch
from pallas_kernels.expert_mlp import xla


def expert_mlp(
    x: jax.Array,
    gate_up: jax.Array,
    down: jax.Array,
    expert_ids: jax.Array,
    expert_weights: jax.Array,
    *,
    activation: str = "silu",
    implementation: str | None = None,
) -> jax.Array:
    """y[t] = sum over k of w[t, k] * (act(x[t] @ W_gate) * (x[t] @ W_up)) @ W_down, W of expert ids[t, k].

    x: [T, D]
    gate_up: [E, D, 2F], the gate in the first F columns, up in the last F
    down: [E, F, D]
    expert_ids: int32 [T, K]; a negative id skips the pair
    expert_weights: float32 [T, K]
    activation: "silu" or "gelu_tanh"
    returns [T, D] in x.dtype; float32 accumulation, the K experts summed in the order of expert_ids
    """
    implementations = {"mosaic_gpu": _mosaic_gpu, "cpu": _cpu, "xla": xla.expert_mlp}
    args = (x, gate_up, down, expert_ids, expert_weights)
    return dispatch("expert_mlp", implementations, implementation, *args, activation=activation)


def _cpu(*args, **kwargs):
    from pallas_kernels.expert_mlp import cpu

    return cpu.expert_mlp(*args, **kwargs)


def _mosaic_gpu(*args, **kwargs):
    from pallas_kernels.expert_mlp import mosaic_gpu

    return mosaic_gpu.expert_mlp(*args, **kwargs)
