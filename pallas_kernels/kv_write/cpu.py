"""kv_write as a native CPU kernel."""


def kv_write(*args, **kwargs):
    """See `api.kv_write`."""
    raise NotImplementedError("no CPU kernel yet")
