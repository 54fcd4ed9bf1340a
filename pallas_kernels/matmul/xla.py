"""matmul as XLA's dot: the reference, and the path of everything but a few rows on the CPU."""

import jax
import jax.numpy as jnp
from jax import lax


def matmul(x: jax.Array, w: jax.Array) -> jax.Array:
    """See `api.matmul`."""
    # float32 is asked for to be exact; the default on GPUs would round the factors to TF32.
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else lax.Precision.DEFAULT
    return lax.dot(x, w, precision=precision, preferred_element_type=jnp.float32)
