"""The engine: admission, step plan, padded batch, jitted step, sampling, update."""
