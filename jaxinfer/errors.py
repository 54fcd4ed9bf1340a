"""Every error that jaxinfer raises on purpose. The message names the thing, the value, and what would be accepted."""


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
        super().__init__(message)
        self.code = code
        self.message = message


class EngineError(JaxInferError):
    """The engine cannot go on: its memory plan does not fit, or the device failed."""
