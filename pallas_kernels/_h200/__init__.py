"""Compiles the Hopper kernels for an H200 on a machine without one: python -m pallas_kernels._h200

Needs jax[cuda13-local] (the compiler, no driver). Fails where a kernel does not compile, spills registers, takes more
shared memory than there is, or copies what it should write in place.
"""
