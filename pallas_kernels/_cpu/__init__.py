"""What the CPU kernels share: XLA's foreign-function frame, its thread pool, vectors, and a matmul of small tiles.

The kernels are numba functions over raw addresses (int64), compiled to XLA FFI handlers; no Python runs in a call.
"""
