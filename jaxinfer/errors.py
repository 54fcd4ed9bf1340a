"""Every error that jaxinfer raises on purpose. The message names the thing, the value, and what would be accepted."""

# Codes of errors that are no request's own fault: a resumed batch asks again. All other codes come from the request.
ENGINE_FAILURE = "engine_failure"  # the engine raised something while it answered this request, or lost it
INPUT_UNREADABLE = "input_unreadable"  # the input file ends in the middle, or is damaged
KV_POOL_EXCEEDED = "kv_pool_exceeded"  # longer than the KV pool; another machine or setting may hold it
RETRIED = frozenset({ENGINE_FAILURE, INPUT_UNREADABLE, KV_POOL_EXCEEDED})


class JaxInferError(Exception):
    """Base of all errors of this package."""


class ConfigError(JaxInferError):
    """A setting that does not exist or cannot hold the value it was given."""


class ModelError(JaxInferError):
    """A model folder that cannot be read: missing, corrupt, of an unknown kind, or not matching its config."""


class RequestError(JaxInferError):
    """One request that cannot be served. It concerns that request alone and ends up on its completion.

    Attributes:
      code: short machine-readable reason, such as "invalid_value" or "prompt_too_long".
      message: one sentence for people.
    """

    def __init__(self, code: str, message: str):
        super().__init__(code, message)  # both, or it could not be pickled
        self.code = code
        self.message = message

    def __str__(self) -> str:
        return self.message


class EngineError(JaxInferError):
    """The engine cannot go on: its memory plan does not fit, or the device failed."""


class JournalError(JaxInferError):
    """A batch output that cannot be written, or that is not this run's own."""
