"""Rows of keys laid out in a paged pool with its bounds, and plain-numpy versions of what the engine computes."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.attention import QuestPolicy, Selection
from jaxinfer.attention import choose as choose_pages
from pallas_kernels.page_bounds import page_bounds


@dataclass
class PagedRows:
    """Keys and values of several rows, each [kv_len, Hkv, D], in a pool whose pages lie in random order."""

    keys: list[np.ndarray]
    values: list[np.ndarray]
    k_pages: jax.Array
    v_pages: jax.Array
    bounds: jax.Array
    page_table: jax.Array
    kv_len: jax.Array


def lay_out(keys, values=None, page_size=16, dtype=jnp.float32, seed=0, table_width=None) -> PagedRows:
    """One layer; written in one call of page_bounds. Sizes are rounded up, so that few programs are compiled."""
    rng = np.random.default_rng(seed)
    values = keys if values is None else values
    kv_len = np.array([len(row) for row in keys], np.int32)
    counts = -(-kv_len // page_size)
    pages = -(-(int(counts.sum()) + 2) // 64) * 64
    width = table_width or max(int(counts.max()), 1)
    ids = iter(rng.permutation(np.arange(1, pages)))
    table = np.zeros((len(keys), width), np.int32)
    for row, count in enumerate(counts):
        table[row, :count] = [next(ids) for _ in range(count)]
    position = [np.arange(n) for n in kv_len]
    slots = np.concatenate([t[p // page_size] * page_size + p % page_size for t, p in zip(table, position)])
    _, heads, dim = keys[0].shape
    pools = []
    for new in (keys, values):
        pool = rng.standard_normal((pages * page_size, heads, dim)).astype(np.float32)
        pool[slots] = np.concatenate(new)
        pool = pool.reshape(pages, page_size, heads, dim).swapaxes(1, 2)
        pools.append(jnp.asarray(pool[None], dtype))
    bounds = jnp.asarray(rng.standard_normal((1, pages, heads, 2, dim)), dtype)
    padding = -len(slots) % 512
    new = np.pad(np.concatenate(keys), ((0, padding), (0, 0), (0, 0)))
    slots = np.pad(slots, (0, padding), constant_values=-1)
    bounds = page_bounds(
        bounds, 0, jnp.asarray(new, dtype), jnp.asarray(slots, jnp.int32), page_size=page_size
    )
    return PagedRows(keys, values, *pools, bounds, jnp.asarray(table), jnp.asarray(kv_len))


_choose = jax.jit(choose_pages, static_argnums=0, static_argnames="scale")


def choose(policy: QuestPolicy, rows: PagedRows, q) -> Selection:
    return _choose(policy, q, rows.bounds, 0, rows.page_table, rows.kv_len, scale=q.shape[-1] ** -0.5)


def chosen_sets(selection: Selection) -> list[list[list[int]]]:
    """Positions of the chosen pages: [row][head]."""
    positions, count = np.asarray(selection.positions), np.asarray(selection.number)
    return [[list(p[:n]) for p, n in zip(*row)] for row in zip(positions, count)]


def best(scores, count: int) -> list[int]:
    """The largest, the earlier of equal ones, in the order of the text."""
    order = sorted(range(len(scores)), key=lambda page: (-scores[page], page))
    return sorted(order[:count])


def paper_choice(q, keys, token_budget, page_size=16) -> list[list[int]]:
    """evaluation/quest_attention.py for one token, step by step. q: [Hq, D], keys: [kv_len, Hkv, D] -> pages per head."""
    length = len(keys)
    token_budget = min(length, token_budget)
    keys = np.repeat(keys, len(q) // keys.shape[1], axis=1)
    sign = np.where(q > 0, 1, -1).astype(np.float32)
    signed_keys, magnitude = keys * sign, q * sign
    padding = page_size - ((length - 1) % page_size + 1)
    lowest = np.full((padding, *keys.shape[1:]), np.finfo(np.float32).min, np.float32)
    chunks = np.concatenate([signed_keys, lowest]).reshape(-1, page_size, *keys.shape[1:]).max(axis=1)
    weights = np.einsum("hd,phd->hp", magnitude, chunks)
    count = min(max(3, token_budget // page_size), weights.shape[1])
    return [best(row, count) for row in weights]


def kernel_choice(q, keys, token_budget, page_size=16) -> list[list[int]]:
    """The CUDA path (quest/utils/controller.py, decode_attn.cuh, decode_select_k.cuh) for one token."""
    keys = np.repeat(keys, len(q) // keys.shape[1], axis=1)
    pages = [keys[at : at + page_size] for at in range(0, len(keys), page_size)]
    budget = min(token_budget // page_size, len(pages))
    if len(pages) <= budget:
        return [list(range(len(pages)))] * len(q)
    scores = [np.maximum(q * p.max(axis=0), q * p.min(axis=0)).sum(axis=-1) for p in pages[:-1]]
    scores = np.array(scores, np.float32).astype(np.float16)
    last = len(pages) - 1
    return [best(scores[:, head], budget - 1) + [last] for head in range(len(q))]
