"""The routed experts of one mixture-of-experts layer; work in proportion to the (token, expert) pairs."""

from pallas_kernels.expert_mlp.api import expert_mlp
from pallas_kernels.expert_mlp.xla import grouped_matmul

__all__ = ["expert_mlp", "grouped_matmul"]
