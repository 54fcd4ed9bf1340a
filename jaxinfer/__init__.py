"""jaxinfer: offline batch inference for large language models in JAX.

```python
from jaxinfer import LLM, SamplingParams
llm = LLM("path/to/converted")
for out in llm.generate(["Once upon a time"], SamplingParams(max_tokens=64, temperature=0)):
    print(out.text, out.finish_reason, out.usage)
```
"""

from typing import TYPE_CHECKING, Any

from jaxinfer.config import Settings, load_config
from jaxinfer.core import Completion, FinishReason, Request, SamplingParams
from jaxinfer.errors import ConfigError, EngineError, JaxInferError, ModelError, RequestError

if TYPE_CHECKING:
    from jaxinfer.llm import LLM

__all__ = [
    "LLM",
    "Completion",
    "ConfigError",
    "EngineError",
    "FinishReason",
    "JaxInferError",
    "ModelError",
    "Request",
    "RequestError",
    "SamplingParams",
    "Settings",
    "load_config",
]


def __getattr__(name: str) -> Any:
    """LLM is imported when first used: settings and errors need neither JAX nor transformers."""
    if name == "LLM":
        from jaxinfer.llm import LLM

        return LLM
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
