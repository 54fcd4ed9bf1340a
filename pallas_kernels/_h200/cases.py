"""What is compiled: every kernel with the shapes of real models, taken from its own shapes."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels._h200.attention_cases import ATTENTION_CASES
from pallas_kernels._h200.case import LAYERS, POOL_PAGES, Array, Case
from pallas_kernels._h200.low_bit_cases import LOW_BIT_CASES
from pallas_kernels.expert_mlp import mosaic_gpu as experts
from pallas_kernels.expert_mlp.shapes import ON_GPU as EXPERT_SHAPES
from pallas_kernels.hybrid_attention import mosaic_gpu as hybrid
from pallas_kernels.hybrid_attention.shapes import SHAPES as MIXED_SHAPES
from pallas_kernels.packed_pages import PackedPages
from pallas_kernels.page_bounds import ScaledBounds
from pallas_kernels.page_bounds import mosaic_gpu as bounds
from pallas_kernels.page_bounds.shapes import SHAPES as BOUNDS_SHAPES
from pallas_kernels.page_scores import mosaic_gpu as scores
from pallas_kernels.page_scores.shapes import SHAPES as SCORES_SHAPES
from pallas_kernels.page_select import mosaic_gpu as select
from pallas_kernels.page_select.shapes import SHAPES as SELECT_SHAPES
from pallas_kernels.ragged_attention import mosaic_gpu as ragged
from pallas_kernels.ragged_attention.shapes import ON_GPU as RAGGED_SHAPES


def _ragged(shape) -> Case:
    rows, tokens = len(shape.rows), sum(count for count, _ in shape.rows)
    pool = ((LAYERS, POOL_PAGES, shape.kv_heads, shape.page_size, shape.head_dim), "bfloat16")
    width = -(-max(length for _, length in shape.rows) // shape.page_size)
    of_rows: tuple[Array, ...] = (((rows, width), "int32"), *(((rows,), "int32"),) * 3)

    def run(*args):
        return ragged.ragged_attention(*args[:-1], scale=shape.head_dim**-0.5, window=args[-1])

    q = ((tokens, shape.q_heads, shape.head_dim), "bfloat16")
    wgmma = r"wgmma\.mma_async\S*\.f32\.bf16\.bf16"
    return Case(run, (q, pool, pool, ((), "int32"), *of_rows, ((), "int32")), instruction=wgmma)


def _packed_ragged(shape, bits) -> Case:
    q, pool, _, *rest = _ragged(shape).arguments
    codes, words = (*pool[0][:4], shape.head_dim * bits // 8), pool[0][:4]

    def run(q, k_codes, k_words, v_codes, v_words, *args):
        pools = PackedPages(k_codes, k_words), PackedPages(v_codes, v_words)
        return ragged.ragged_attention(q, *pools, *args[:-1], scale=shape.head_dim**-0.5, window=args[-1])

    return Case(run, (q, *((codes, "uint8"), (words, "int32")) * 2, *rest))


def _hybrid(shape) -> Case:
    decodes, chunks = len(shape.decodes), len(shape.chunks)
    rows, page = decodes + chunks, shape.page_size
    pool = ((LAYERS, POOL_PAGES, shape.kv_heads, page, shape.head_dim), "bfloat16")
    width = max(-(-length // page) for _, length in shape.chunks)
    of_rows: tuple[Array, ...] = (((rows, width), "int32"), *(((rows,), "int32"),) * 3, ((rows,), "bool"))
    listed = (rows, shape.lists, -(-max(shape.decodes) // page))
    q = ((decodes + sum(count for count, _ in shape.chunks), shape.q_heads, shape.head_dim), "bfloat16")
    run = functools.partial(hybrid.hybrid_attention, scale=shape.head_dim**-0.5, window=0, pace=1.0)
    return Case(run, (q, pool, pool, ((), "int32"), *of_rows, (listed, "int32"), (listed[:2], "int32")))


def _packed_hybrid(shape, bits) -> Case:
    q, pool, _, *rest = _hybrid(shape).arguments
    codes, words = (*pool[0][:4], shape.head_dim * bits // 8), pool[0][:4]

    def run(q, k_codes, k_words, v_codes, v_words, *args):
        pools = PackedPages(k_codes, k_words), PackedPages(v_codes, v_words)
        return hybrid.hybrid_attention(q, *pools, *args, scale=shape.head_dim**-0.5, window=0, pace=1.0)

    return Case(run, (q, *((codes, "uint8"), (words, "int32")) * 2, *rest))


def _scores(shape) -> Case:
    rows, width = len(shape.kv_len), -(-max(shape.kv_len) // shape.page_size)
    q = ((rows, shape.q_heads, shape.head_dim), "bfloat16")
    pool = ((LAYERS, POOL_PAGES, shape.kv_heads, 2, shape.head_dim), "bfloat16")
    run = functools.partial(scores.page_scores, page_size=shape.page_size, spread=1.0)
    return Case(run, (q, pool, ((), "int32"), ((rows, width), "int32"), ((rows,), "int32")))


def _scaled_scores(shape) -> Case:
    q, pool, *where = _scores(shape).arguments
    values, scales = (pool[0], "int8"), (pool[0][:3], "float32")

    def run(q, values, scales, *where):
        bounds = ScaledBounds(values, scales)
        return scores.page_scores(q, bounds, *where, page_size=shape.page_size, spread=1.0)

    return Case(run, (q, values, scales, *where))


def _select(shape, top_p=1.0) -> Case:
    rows = len(shape.pages)
    given = ((rows, shape.heads, shape.group, max(shape.pages)), "float32")
    settings = {"width": shape.keep, "first": shape.first, "last": shape.last}
    run = functools.partial(select.page_select, scale=0.1, top_p=top_p, **settings)
    return Case(run, (given, ((rows,), "int32"), ((rows,), "int32")))


def _bounds(shape) -> Case:
    tokens = sum(count for _, count in shape.runs)
    pool = ((LAYERS, POOL_PAGES, shape.kv_heads, 2, shape.head_dim), "bfloat16")
    k = ((tokens, shape.kv_heads, shape.head_dim), "bfloat16")
    run = functools.partial(bounds.page_bounds, page_size=shape.page_size)
    return Case(run, (pool, ((), "int32"), k, ((tokens,), "int32")), in_place=1)


def _scaled_bounds(shape) -> Case:
    pool, *rest = _bounds(shape).arguments

    def run(values, scales, *rest):
        return bounds.page_bounds(ScaledBounds(values, scales), *rest, page_size=shape.page_size)

    return Case(run, ((pool[0], "int8"), (pool[0][:3], "float32"), *rest), in_place=2)


def _bounds_of_all_layers(shape) -> Case:
    """As in a model: a scan over layers that carries the bounds."""
    one = _bounds(shape)

    def run(pool, k, slots):
        def layer(pool, index):
            return one.run(pool, index, k, slots), None

        return jax.lax.scan(layer, pool, jnp.arange(LAYERS))[0]

    pool, _, k, slots = one.arguments
    return Case(run, (pool, k, slots), in_place=1)


def _experts(shape) -> Case:
    gate_up = (shape.experts, shape.model_dim, 2 * shape.hidden_dim)
    down = (shape.experts, shape.hidden_dim, shape.model_dim)
    chosen = (shape.tokens, shape.top_k)
    arrays = (
        ((shape.tokens, shape.model_dim), "bfloat16"),
        (gate_up, "bfloat16"),
        (down, "bfloat16"),
        (chosen, "int32"),
        (chosen, "float32"),
    )
    run = functools.partial(experts.expert_mlp, activation="silu")
    return Case(run, arrays, instruction=r"wgmma\.mma_async\S*\.f32\.bf16\.bf16")


CASES = {
    **ATTENTION_CASES,
    **{f"ragged_attention {name}": _ragged(shape) for name, shape in RAGGED_SHAPES.items()},
    **{
        f"ragged_attention {name} int{bits}": _packed_ragged(RAGGED_SHAPES[name], bits)
        for name, bits in (
            ("pocket_prefill", 8),
            ("llama3_8b_chunks", 4),
            ("llama3_8b_chunks", 8),
            ("llama3_8b_page_32", 4),
        )
    },
    **{f"hybrid_attention {name}": _hybrid(shape) for name, shape in MIXED_SHAPES.items()},
    **{
        f"hybrid_attention {name} int{bits}": _packed_hybrid(MIXED_SHAPES[name], bits)
        for bits, names in {
            4: ("llama3_8b_balanced", "llama3_8b_quest", "llama3_8b_page_32", "llama2_7b"),
            8: ("pocket", "llama3_8b_quest", "llama3_8b_page_32", "llama2_7b"),
        }.items()
        for name in names
    },
    **{f"page_scores {name}": _scores(shape) for name, shape in SCORES_SHAPES.items()},
    **{f"page_scores {name} int8": _scaled_scores(shape) for name, shape in SCORES_SHAPES.items()},
    **{f"page_select {name}": _select(shape) for name, shape in SELECT_SHAPES.items()},
    "page_select by weight": _select(SELECT_SHAPES["llama3_8b_32k_2048"], top_p=0.9),
    **{f"page_bounds {name}": _bounds(shape) for name, shape in BOUNDS_SHAPES.items() if name != "tiny"},
    **{
        f"page_bounds {name} int8": _scaled_bounds(shape)
        for name, shape in BOUNDS_SHAPES.items()
        if name != "tiny"
    },
    **{f"expert_mlp {name}": _experts(shape) for name, shape in EXPERT_SHAPES.items()},
    **LOW_BIT_CASES,
    "page_bounds scan": _bounds_of_all_layers(BOUNDS_SHAPES["llama3_8b_decode"]),
}
