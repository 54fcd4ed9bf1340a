"""Decode attention, over bfloat16 and packed pools, and the product beside it."""

import functools

from pallas_kernels._h200.case import LAYERS, POOL_PAGES, Case
from pallas_kernels._h200.low_bit_cases import product
from pallas_kernels.hybrid_matmul import mosaic_gpu as hybrid
from pallas_kernels.hybrid_matmul.shapes import SHAPES as PAIRS
from pallas_kernels.packed_pages import PackedPages
from pallas_kernels.page_attention import mosaic_gpu as kernel
from pallas_kernels.page_attention.shapes import SHAPES


def attention(shape) -> Case:
    rows = len(shape.tokens)
    pool = ((LAYERS, POOL_PAGES, shape.kv_heads, shape.page_size, shape.head_dim), "bfloat16")
    width = -(-max(shape.tokens) // shape.page_size)
    q = ((rows, shape.q_heads, shape.head_dim), "bfloat16")
    lists, tokens = ((rows, shape.lists, width), "int32"), ((rows, shape.lists), "int32")
    run = functools.partial(kernel.page_attention, scale=shape.head_dim**-0.5)
    return Case(run, (q, pool, pool, ((), "int32"), lists, tokens))


def packed_attention(shape, bits) -> Case:
    """page_attention over pools of `bits`."""
    q, pool, _, layer, lists, tokens = attention(shape).arguments
    codes, words = (*pool[0][:4], shape.head_dim * bits // 8), pool[0][:4]

    def run(q, k_codes, k_words, v_codes, v_words, *args):
        pools = PackedPages(k_codes, k_words), PackedPages(v_codes, v_words)
        return kernel.page_attention(q, *pools, *args, scale=shape.head_dim**-0.5)

    return Case(run, (q, *((codes, "uint8"), (words, "int32")) * 2, layer, lists, tokens))


def _beside(shape) -> Case:
    attends, size = attention(shape.attention), shape.product
    x, w = ((size.rows, size.inputs), "bfloat16"), ((size.inputs, size.outputs), "bfloat16")
    run = functools.partial(hybrid.hybrid_matmul, scale=shape.attention.head_dim**-0.5, pace=1.0)
    return Case(run, (x, w, *attends.arguments), shared_kib=223)


def _beside_packed_pages(shape) -> Case:
    """The plain product, beside attention over keys and values of 4 bits."""
    x, w = _beside(shape).arguments[:2]

    def run(x, w, q, k_codes, k_words, v_codes, v_words, *rest):
        pools = PackedPages(k_codes, k_words), PackedPages(v_codes, v_words)
        return hybrid.hybrid_matmul(x, w, q, *pools, *rest, scale=0.1, pace=1.0)

    return Case(run, (x, w, *packed_attention(shape.attention, 4).arguments), shared_kib=175)


def _packed_beside(shape) -> Case:
    """The product of low bits, beside attention over keys and values of 4 bits."""
    arguments, operands = product(shape.product, two_level=True)
    attends = packed_attention(shape.attention, 4)

    def run(*args):
        x, w = operands(*args[: len(arguments)])
        q, k_codes, k_words, v_codes, v_words, *rest = args[len(arguments) :]
        pools = PackedPages(k_codes, k_words), PackedPages(v_codes, v_words)
        return hybrid.hybrid_matmul(x, w, q, *pools, *rest, scale=0.1, pace=1.0)

    return Case(run, (*arguments, *attends.arguments), shared_kib=104)


ATTENTION_CASES = {
    **{f"page_attention {name}": attention(shape) for name, shape in SHAPES.items()},
    **{
        f"page_attention {name} int{bits}": packed_attention(SHAPES[name], bits)
        for bits, names in {
            4: ("pocket_2048", "llama3_8b_2048", "llama3_8b_page_32", "llama2_7b_1024"),
            8: ("pocket_dense", "llama3_8b_2048"),
        }.items()
        for name in names
    },
    **{f"hybrid_matmul {name}": _beside(shape) for name, shape in PAIRS.items()},
    **{f"hybrid_matmul {name} int4": _beside_packed_pages(shape) for name, shape in PAIRS.items()},
    **{f"hybrid_matmul {name} w4a8 int4": _packed_beside(shape) for name, shape in PAIRS.items()},
}
