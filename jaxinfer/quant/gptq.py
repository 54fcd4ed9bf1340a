"""GPTQ (arXiv 2210.17323): round input channels one after another, and let those that follow mend the error."""

from __future__ import annotations

import numpy as np

from jaxinfer.errors import ConfigError
from jaxinfer.quant.form import Quantization
from jaxinfer.quant.rounding import Rounded, Steps, nearest, round_high

BLOCK = 128  # channels between two updates of all that follow, or as many whole groups as fit in them


def gptq(weights: np.ndarray, hessian: np.ndarray, form: Quantization, clip: float) -> Rounded:
    """Rounds a matrix so that its product with the inputs changes least.

    The scale of a group is found when its first channel is reached, on weights that have taken up the errors before.
    Channels without any input (zero diagonal) are set to zero. Outlier channels come last and take up the rest.

    Args:
      weights: [N, K], channels in their final order.
      hessian: float64 [K, K], proportional to X^T X of the (rounded) inputs, in the same order.

    Raises:
      ConfigError: the Hessian is singular, and the form's damping too small to mend that.
    """
    outs, ins = weights.shape
    kept, group = form.kept(ins), form.group_of(ins)
    weights, hessian = weights.astype(np.float64), hessian.copy()
    dead = np.diag(hessian) == 0
    hessian[dead, dead] = 1
    weights[:, dead] = 0
    upper = _inverse_root(hessian, form.damping)

    steps = Steps(weights, form, clip)
    codes, scales = np.empty((outs, kept), np.int8), []
    each = np.empty(outs, np.float32)
    block = max(BLOCK // group, 1) * group if group < kept else min(BLOCK, kept)
    if group == kept:  # one group: its scale has to be known at the start
        scale, each = steps.find(weights[:, :kept])
        scales.append(scale)
    for begin in range(0, kept, block):
        end = min(begin + block, kept)
        here, errors = weights[:, begin:end], np.empty((outs, end - begin))
        for i in range(end - begin):
            if group < kept and (begin + i) % group == 0:
                scale, each = steps.find(here[:, i : i + group])
                scales.append(scale)
            code = nearest(here[:, i], each)
            codes[:, begin + i] = code
            errors[:, i] = (here[:, i] - code * each) / upper[begin + i, begin + i]
            here[:, i + 1 :] -= errors[:, i, None] * upper[begin + i, begin + i + 1 : end]
        weights[:, end:] -= errors @ upper[begin:end, end:]
    return Rounded(codes, np.stack(scales, 1), steps.channel, *round_high(weights[:, kept:], form))


def _inverse_root(hessian: np.ndarray, damping: float) -> np.ndarray:
    """Upper U with U^T U the inverse of the damped Hessian."""
    damped = hessian + damping * np.mean(np.diag(hessian)) * np.eye(len(hessian))
    try:
        return np.linalg.cholesky(np.linalg.inv(damped)).T
    except np.linalg.LinAlgError:
        raise ConfigError(
            f"quantization.damping = {damping!r} is too small: the inputs' second moments are singular; 0.01 is usual"
        ) from None
