"""The authors' scheme in plain numpy, one group and one channel at a time: what ours is held against."""

import numpy as np


def order_of(x):
    """Channels by ascending sum of squares of the inputs x [n, K]."""
    return np.argsort((x.astype(np.float64) ** 2).sum(0), kind="stable")


def round_rows(x, bits, group, clip, outliers):
    """Inputs as the model sees them: groups of a token share a scale, the last channels are 8 bits with one scale."""
    out = np.zeros(x.shape)
    kept = x.shape[1] - outliers
    for token in range(len(x)):
        for begin in [*range(0, kept, group)]:
            part = x[token, begin : begin + group].astype(np.float32)
            scale = (
                np.float32(clip) * max(np.abs(part).max(), np.float32(1e-5)) / np.float32(2 ** (bits - 1) - 1)
            )
            codes = np.clip(np.rint(part / scale), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
            out[token, begin : begin + group] = np.float32(scale) * codes.astype(np.float32)
        part = x[token, kept:].astype(np.float32)
        scale = max(np.abs(part).max(), np.float32(1e-5)) / np.float32(127)
        out[token, kept:] = np.clip(np.rint(part / scale), -128, 127).astype(np.float32) * scale
    return out


def rtn(w, group, clip, outliers, rows=2):
    """Codes and scales of weights [N, K]: two adjacent rows of a group share clip * largest / 7; then 8-bit columns."""
    n, k = w.shape
    codes, scales = np.zeros((n, k), np.int64), np.zeros((n // rows, (k - outliers) // group))
    for pair in range(n // rows):
        for g in range((k - outliers) // group):
            at = np.s_[pair * rows : (pair + 1) * rows, g * group : (g + 1) * group]
            scale = np.float32(clip) * np.abs(w[at]).max() / np.float32(7)
            scales[pair, g] = scale
            codes[at] = np.clip(np.rint(w[at] / scale), -8, 7)
    high = np.zeros(n)
    for row in range(n):
        high[row] = np.abs(w[row, k - outliers :]).max() / np.float32(127)
        codes[row, k - outliers :] = np.rint(w[row, k - outliers :] / np.float32(high[row]))
    return codes, scales, high


def gptq(w, hessian, group, clip, outliers, rows=2, damping=0.01):
    """Frantar et al., column by column without blocks; the zero point of the 15 steps is 8."""
    w, h = w.astype(np.float64).copy(), hessian.astype(np.float64).copy()
    n, k = w.shape
    for channel in range(k):
        if h[channel, channel] == 0:
            h[channel, channel] = 1
            w[:, channel] = 0
    h += np.eye(k) * damping * np.diag(h).mean()
    upper = np.linalg.cholesky(np.linalg.inv(h)).T
    codes, scales = np.zeros((n, k), np.int64), np.zeros((n // rows, (k - outliers) // group))
    for channel in range(k - outliers):
        g = channel // group
        if channel % group == 0:
            for pair in range(n // rows):
                largest = np.abs(w[pair * rows : (pair + 1) * rows, channel : channel + group]).max()
                scales[pair, g] = np.float32(2 * clip) * np.float32(largest) / np.float32(15)
        scale = np.repeat(scales[:, g], rows).astype(np.float32)
        level = np.clip(np.rint(w[:, channel] / scale) + 8, 0, 15)
        codes[:, channel] = level - 8
        error = (w[:, channel] - codes[:, channel] * scale.astype(np.float64)) / upper[channel, channel]
        w[:, channel:] -= np.outer(error, upper[channel, channel:])
    high = np.abs(w[:, k - outliers :]).max(1).astype(np.float32) / np.float32(127)
    codes[:, k - outliers :] = np.rint(w[:, k - outliers :] / high[:, None])
    return codes, scales, high
