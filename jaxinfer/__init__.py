"""jaxinfer: offline batch inference for large language models in JAX."""
