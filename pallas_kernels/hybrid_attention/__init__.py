"""The attention of a mixed step in one launch: prefill tiles beside decoding tokens' lists of pages."""

from pallas_kernels.hybrid_attention.api import hybrid_attention
from pallas_kernels.hybrid_attention.xla import merge

__all__ = ["hybrid_attention", "merge"]
