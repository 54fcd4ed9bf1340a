"""The training forward of the pocket model: the engine's parameters, differentiable attention and experts, no cache."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxinfer.models import rotary
from jaxinfer.models.config import ModelConfig
from jaxinfer.models.layers import Attention, Decoder, MoE
from jaxinfer.models.norms import norm

CAPACITY = 1.5  # rows of an expert's buffer, over its uniform share
SHORT, LONG = 128, 256  # queries of one attention block, in sequences up to KEPT tokens and in longer ones
KEPT = 512  # tokens of a sequence whose attention weights are kept for the backward pass


class Losses(NamedTuple):
    """nll: weighted mean over targets; balance: Switch's, 1 when uniform; z: router logits; load: [layers, E], times uniform;
    hints: mean negative log-likelihood of what the probes should read."""

    nll: jax.Array
    balance: jax.Array
    z: jax.Array
    load: jax.Array
    hints: jax.Array


def forward(
    model: Decoder, config: ModelConfig, ids: jax.Array, positions: jax.Array, capacity: float = CAPACITY
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]:
    """Hidden states after the final norm, what the routers did, and the hidden states that probes read.

    Args:
      ids, positions: int32 [B, L].
      capacity: see CAPACITY; tokens beyond it miss that expert.

    Returns:
      hidden [B, L, D], balance [], z [], load [layers, E], halfway [2, B, L, D]: after half of the layers, and before the last.
    """
    rows, length = ids.shape
    flat = positions.reshape(-1)
    angles = rotary.angles(config.rope, flat, flat + 1)
    hidden = model.embed[ids.reshape(-1)]
    balances, zs, loads, after = [], [], [], []
    for layer in (layer for run in model.runs for layer in run):
        x = norm(hidden, layer.attn_norm, config)
        hidden = hidden + attention(x, layer.attention, config, angles, rows)
        x = norm(hidden, layer.mlp_norm, config)
        added, balance, z, load = experts(x, layer.mlp, config, capacity)
        hidden = hidden + added
        after.append(hidden)
        balances.append(balance)
        zs.append(z)
        loads.append(load)
    hidden = norm(hidden, model.norm, config).reshape(rows, length, -1)
    halfway = jnp.stack([after[len(after) // 2 - 1], after[-2]]).reshape(2, rows, length, -1)
    return hidden, jnp.mean(jnp.stack(balances)), jnp.mean(jnp.stack(zs)), jnp.stack(loads), halfway


def attention(
    x: jax.Array, weights: Attention, config: ModelConfig, angles: rotary.Angles, rows: int
) -> jax.Array:
    """Causal attention of `rows` sequences laid end to end. x [T, D] -> [T, D]."""
    tokens, wide = x.shape
    group, dim = config.group, config.head_dim
    fused = (x @ weights.qkv.reshape(wide, -1)).reshape(tokens, config.kv_heads, group + 2, dim)
    turned = rotary.rotate(fused[:, :, : group + 1].reshape(tokens, -1, dim), angles)
    turned = turned.reshape(rows, -1, config.kv_heads, group + 1, dim).transpose(0, 2, 3, 1, 4)
    q, k = turned[:, :, :group] * dim**-0.5, turned[:, :, group]  # [B, Hkv, G, L, Dh], [B, Hkv, L, Dh]
    v = fused[:, :, group + 1].reshape(rows, -1, config.kv_heads, dim).transpose(0, 2, 1, 3)
    length = q.shape[3]
    size, block = (SHORT, attend) if length <= KEPT else (LONG, jax.checkpoint(attend))
    ends = [*range(size, length, size), length]
    parts = [block(q[:, :, :, a:b], k[:, :, :b], v[:, :, :b]) for a, b in zip([0, *ends], ends)]
    out = jnp.concatenate(parts, axis=3)
    out = out.transpose(0, 3, 1, 2, 4).reshape(tokens, -1)
    return out @ weights.out.reshape(-1, wide)


def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """The queries are the last of the sequence. q [B, Hkv, G, Q, Dh], k, v [B, Hkv, L, Dh] -> as q."""
    rows, heads, group, queries, dim = q.shape
    length = k.shape[2]
    scores = jnp.einsum("bhqd,bhkd->bhqk", q.reshape(rows, heads, group * queries, dim), k)
    scores = scores.reshape(rows, heads, group, queries, length)
    visible = jnp.arange(length) <= jnp.arange(length - queries, length)[:, None]
    weights = jax.nn.softmax(jnp.where(visible, scores, -1e30), axis=-1)
    return jnp.einsum("bhqk,bhkd->bhqd", weights.reshape(rows, heads, group * queries, length), v).reshape(
        q.shape
    )


def experts(
    x: jax.Array, weights: MoE, config: ModelConfig, capacity: float
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Mixtral's experts by buffers of fixed size. x [T, D] -> [T, D], balance [], z [], load [E]."""
    assert config.moe is not None
    count, chosen = config.moe.experts, config.moe.experts_per_token
    tokens, wide = x.shape
    scores = x @ weights.router
    shares = jax.nn.softmax(scores, axis=-1)
    top, ids = jax.lax.top_k(shares, chosen)
    top = top / top.sum(-1, keepdims=True)
    size = int(capacity * tokens * chosen / count)
    slots = _slots(ids, count, size)  # [T, K]
    owner = jnp.full(count * size + 1, tokens, jnp.int32)
    owner = owner.at[slots.reshape(-1)].set(jnp.repeat(jnp.arange(tokens, dtype=jnp.int32), chosen))
    owner = owner.at[-1].set(tokens)
    inner = _scatter(x, owner[:-1], slots).reshape(count, size, wide)
    width = weights.gate_up.shape[-1]
    both = jnp.einsum("ecd,edf->ecf", inner, weights.gate_up.reshape(count, wide, 2 * width))
    inner = jnp.einsum(
        "ecf,efd->ecd", jax.nn.silu(both[..., :width]) * both[..., width:], weights.down
    ).reshape(count * size, wide)
    mixed = _collect(inner, top, owner[:-1], slots)
    load = jnp.mean(jax.nn.one_hot(ids, count), axis=(0, 1)) * count
    balance = jnp.sum(jax.lax.stop_gradient(load) * shares.mean(0))
    z = jnp.mean(jnp.square(jax.nn.logsumexp(scores, axis=-1)))
    return mixed, balance, z, load


def _slots(ids: jax.Array, count: int, size: int) -> jax.Array:
    """Row of each choice in the experts' buffers laid end to end, [T, K]; count * size where its expert is full."""
    flat = ids.reshape(-1, 128)  # ranks within groups of 128 by a triangular product, which is quick on a CPU
    one = jax.nn.one_hot(flat, count, dtype=jnp.float32)
    before = jnp.einsum("ij,gje->gie", jnp.tril(jnp.ones((128, 128), jnp.float32), -1), one)
    sums = one.sum(1)
    before = before + (jnp.cumsum(sums, axis=0) - sums)[:, None]
    rank = jnp.sum(before * one, axis=-1).astype(jnp.int32)
    return jnp.where(rank < size, flat * size + rank, count * size).reshape(ids.shape)


@jax.custom_vjp
def _scatter(x: jax.Array, owner: jax.Array, slots: jax.Array) -> jax.Array:
    """Token rows to the experts' buffers. x [T, D], owner [S] (T: empty), slots [T, K] (S: none) -> [S, D].

    Both directions gather: a scatter of rows is slow on a CPU.
    """
    return _rows(x, owner)


def _scatter_forward(x, owner, slots):
    return _rows(x, owner), slots


def _scatter_backward(slots, slope):
    return sum(_rows(slope, slots[:, i]) for i in range(slots.shape[1])), None, None


_scatter.defvjp(_scatter_forward, _scatter_backward)


@jax.custom_vjp
def _collect(inner: jax.Array, shares: jax.Array, owner: jax.Array, slots: jax.Array) -> jax.Array:
    """Weighted sum of a token's expert outputs. inner [S, D], shares [T, K] -> [T, D]."""
    first, second = (_rows(inner, slots[:, i]) * shares[:, i, None] for i in range(2))
    return first + second


def _collect_forward(inner, shares, owner, slots):
    return _collect(inner, shares, owner, slots), (inner, shares, owner, slots)


def _collect_backward(kept, slope):
    inner, shares, owner, slots = kept
    chosen = slots.shape[1]
    of_shares = jnp.stack([jnp.sum(_rows(inner, slots[:, i]) * slope, -1) for i in range(chosen)], -1)
    share = jnp.zeros(inner.shape[0] + 1).at[slots.reshape(-1)].set(shares.reshape(-1))
    return _rows(slope, owner) * share[:-1, None], of_shares, None, None


_collect.defvjp(_collect_forward, _collect_backward)


def _rows(x: jax.Array, index: jax.Array) -> jax.Array:
    """x[index], zeros where the index is beyond x."""
    return x.at[index].get(mode="fill", fill_value=0)


def losses(
    model: Decoder,
    config: ModelConfig,
    ids: jax.Array,
    positions: jax.Array,
    weights: jax.Array,
    hints: jax.Array,
    probes: jax.Array,
    capacity: float = CAPACITY,
) -> Losses:
    """Of sequences as in bench.pocket.data.Rows; probes: [2 x slots of a level, D, D], to where the head reads tokens."""
    hidden, balance, z, load, halfway = forward(model, config, ids[:, :-1], positions[:, :-1], capacity)
    head = model.head if model.head is not None else model.embed.T
    scores = hidden.reshape(-1, hidden.shape[-1]) @ head
    each = optax.softmax_cross_entropy_with_integer_labels(scores, ids[:, 1:].reshape(-1))
    weight = weights[:, 1:].reshape(-1)
    nll = jnp.sum(each * weight) / jnp.maximum(jnp.sum(weight), 1.0)
    return Losses(nll, balance, z, load, _hinted(halfway, hints, probes, head))


def _hinted(halfway: jax.Array, hints: jax.Array, probes: jax.Array, head: jax.Array) -> jax.Array:
    """Mean negative log-likelihood of the hints. halfway [2, B, L, D], hints [B, H, 3], probes [S, D, D], head [D, V]."""
    rows, most, _ = hints.shape
    place, slot, token = hints.reshape(-1, 3).T
    known = slot >= 0
    slot = jnp.maximum(slot, 0)
    state = halfway[slot // (len(probes) // 2), jnp.repeat(jnp.arange(rows), most), place]
    state = state * jax.lax.rsqrt(jnp.mean(jnp.square(state), -1, keepdims=True) + 1e-5)
    read = jnp.einsum("nd,sde->nse", state, probes)
    read = jnp.take_along_axis(read, slot[:, None, None], axis=1)[:, 0]
    each = optax.softmax_cross_entropy_with_integer_labels(read @ head, token)
    return jnp.sum(each * known) / jnp.maximum(jnp.sum(known), 1)
