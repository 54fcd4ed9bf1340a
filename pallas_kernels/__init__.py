"""Kernels behind the engine, one folder per op, each with an XLA twin that is its reference; knows nothing of jaxinfer."""
