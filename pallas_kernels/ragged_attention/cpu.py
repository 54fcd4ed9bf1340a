"""ragged_attention as a native CPU kernel."""


def ragged_attention(*args, **kwargs):
    """See `api.ragged_attention`."""
    raise NotImplementedError("no CPU kernel yet")
