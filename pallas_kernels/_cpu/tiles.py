"""The tiles as functions that numba code calls: matmuls of small row-major blocks, scores of keys, transposes.

Every element of a product is one chain of multiply-adds in the order of the contraction, whatever tile it falls
into, so a row's result does not depend on how many rows go with it.
"""

import functools
import itertools

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from pallas_kernels._cpu.code import llvm_function
from pallas_kernels._cpu.digit_code import COLUMNS, INTEGER_ROWS, integer_tile_function
from pallas_kernels._cpu.key_code import score_function, transpose_function, unpack_function, widen_function
from pallas_kernels._cpu.matmul_code import (
    PACK,
    PLAIN,
    REST,
    SHARE,
    STREAM,
    TILE_COLUMNS,
    TILE_ROWS,
    tile_function,
)
from pallas_kernels._cpu.memory import I64, jit, pointer
from pallas_kernels._cpu.register import compile_function

# Widths of column tiles, widest first; all numbers of columns are multiples of 8.
WIDTHS = tuple(w for w in (64, 32, 16, 8) if w <= TILE_COLUMNS)
STREAM_WIDTHS = tuple(w for w in (64, 16, 8) if w <= TILE_COLUMNS)
# Tiles without rows and a width, after the kinds of matmul_code.
SCORES, TRANSPOSE, WIDEN, UNPACK = 4, 5, 6, 7

# Stand for the element type of B where a function is typed by it; a bfloat16 is a uint16 to numba. PACKED are codes
# of 8 or 4 bits, which become float32 before a tile of products sees them; INT8 and INT4 (two in a byte, the tag is
# just another type) are integers with scales.
FLOAT32, BFLOAT16, PACKED, INT8, INT4 = np.float32(0), np.uint16(0), np.uint8(0), np.int8(0), np.int16(0)

# The tiles are one library, compiled apart: numba would compile them again into every function on the way up.
_SYMBOLS = {
    types.float32: "pallas_kernels_tiles_float32",
    types.uint16: "pallas_kernels_tiles_bfloat16",
    types.int8: "pallas_kernels_tiles_int8",
    types.int16: "pallas_kernels_tiles_int4",
}
_published: list = []


@jit
def tile_key(kind, width, rows):
    """One number for the switch of the tiles."""
    return kind * 1024 + width * 8 + rows


def _rows_of(kind):
    """Where there are several chunks of rows, none is short, see stream_tile."""
    return range(3 if kind in (PACK, REST) else 1, TILE_ROWS + 1)


def _tiles(kinds_and_widths, bf16):
    """Every tile of a floating B with its key, as a function of the module that they go to."""

    def functions(module):
        for kind, widths in kinds_and_widths:
            for width, rows in itertools.product(widths, _rows_of(kind)):
                yield tile_key.py_func(kind, width, rows), tile_function(module, rows, width, bf16, kind)
        if not bf16:
            for bits in (8, 4):
                yield tile_key.py_func(UNPACK, bits, 0), unpack_function(module, bits)
        for kind, make in (
            (SCORES, score_function),
            (TRANSPOSE, transpose_function),
            (WIDEN, widen_function),
        ):
            yield tile_key.py_func(kind, 0, 0), make(module, bf16)

    return functions


def _integer_tiles(bits):
    """The same for a B of integers."""

    def functions(module):
        for rows in range(1, INTEGER_ROWS + 1):
            yield tile_key.py_func(STREAM, COLUMNS, rows), integer_tile_function(module, rows, bits)

    return functions


def _tile_switch(functions):
    """An intrinsic that gives the address of the tile function that `which` names."""

    @intrinsic
    def find(typingctx, which):
        def codegen(context, builder, signature, args):
            before, done = builder.block, builder.append_basic_block("found")
            switch = builder.switch(args[0], done)
            with builder.goto_block(done):
                address = builder.phi(I64)
            address.add_incoming(ir.Constant(I64, 0), before)
            for key, function in functions(builder.module):
                block = builder.append_basic_block("tile")
                switch.add_case(ir.Constant(I64, key), block)
                with builder.goto_block(block):
                    address.add_incoming(builder.ptrtoint(function, I64), block)
                    builder.branch(done)
            builder.position_at_end(done)
            return address

        return types.int64(types.int64), codegen

    return find


_float32_switch = _tile_switch(
    _tiles(
        [(PLAIN, WIDTHS), (STREAM, STREAM_WIDTHS), (PACK, STREAM_WIDTHS), (REST, STREAM_WIDTHS[:1])],
        bf16=False,
    )
)
_bfloat16_switch = _tile_switch(_tiles([(STREAM, STREAM_WIDTHS), (PACK, STREAM_WIDTHS)], bf16=True))
_int8_switch = _tile_switch(_integer_tiles(8))
_int4_switch = _tile_switch(_integer_tiles(4))


def float32_tiles(which):
    """Address of a tile with a float32 B."""
    return _float32_switch(which)


def bfloat16_tiles(which):
    """Address of a tile with a bfloat16 B."""
    return _bfloat16_switch(which)


def int8_tiles(which):
    """Address of a tile with a B of bytes."""
    return _int8_switch(which)


def int4_tiles(which):
    """Address of a tile with a B of nibbles."""
    return _int4_switch(which)


@functools.cache
def publish(dtype: str) -> None:
    """Compiles the tiles for a B of dtype and makes them known to the linker, before a kernel that calls them is."""
    element, function = {
        "float32": (types.float32, float32_tiles),
        "bfloat16": (types.uint16, bfloat16_tiles),
        "int8": (types.int8, int8_tiles),
        "int4": (types.int16, int4_tiles),
    }[dtype]
    compiled = compile_function(function, types.int64(types.int64))
    _published.append(compiled)
    llvm.add_symbol(_SYMBOLS[element], compiled.address)


@intrinsic
def _run_tile(typingctx, tag, which, c, ldc, a, lda, b, ldb, depth, accumulate, next_b, last):
    """One register tile; tag stands for the type of B.

    The tile is called by its address: a function in between would copy the arguments on the stack by vectors, and
    reading them back before the parts are stored drains the pipeline and with it all requests to memory.
    """
    symbol = _SYMBOLS.get(tag, _SYMBOLS[types.float32])

    def codegen(context, builder, signature, args):
        find = llvm_function(builder.module, symbol, I64, [I64])
        address = builder.call(find, [args[1]])
        builder.call(pointer(builder, address, ir.FunctionType(ir.VoidType(), [I64] * 10)), args[2:])
        return context.get_dummy_value()

    return types.void(tag, *[types.int64] * 11), codegen


@jit
def _plain_width(columns):
    """The widest tile that fits into `columns`, a positive multiple of 8."""
    width = TILE_COLUMNS
    while width > columns:
        width //= 2
    return width


@jit
def stream_width(columns):
    """The widest streaming tile that fits into `columns`, a positive multiple of 8."""
    if columns >= TILE_COLUMNS:
        return TILE_COLUMNS
    return 16 if columns >= 16 else 8


@jit
def matmul(c, ldc, a, lda, b, ldb, rows, columns, depth, accumulate):
    """C[rows, columns] (+)= A[rows, depth] @ B[depth, columns], float32, B near the core; ld* in bytes."""
    done = 0
    while done < columns:
        width = _plain_width(columns - done)
        for first in range(0, rows, TILE_ROWS):
            which = tile_key(PLAIN, width, min(TILE_ROWS, rows - first))
            c_at, a_at = c + first * ldc + 4 * done, a + first * lda
            _run_tile(FLOAT32, which, c_at, ldc, a_at, lda, b + 4 * done, ldb, depth, accumulate, 0, 0)
        done += width


@jit
def stream_tile(tag, size, c, ldc, a, lda, b, ldb, rows, width, depth, accumulate, next_b, pack):
    """One column tile of any number of rows of A. B comes from memory: it is read once, the block at next_b is
    prefetched, and B is packed at `pack` (float32 [depth, width]) where more than one tile of rows needs it.
    """
    chunks = (rows + TILE_ROWS - 1) // TILE_ROWS
    first = 0
    for chunk in range(chunks):
        n = (rows - first + chunks - chunk - 1) // (chunks - chunk)
        c_at, a_at = c + first * ldc, a + first * lda
        if chunk == 0:
            which = tile_key(STREAM if chunks == 1 else PACK, width, n)
            _run_tile(tag, which, c_at, ldc, a_at, lda, b, ldb, depth, accumulate, next_b, pack)
        else:
            requests = chunk == chunks // 2 and width * size > SHARE
            which = tile_key(REST if requests else PLAIN, width, n)
            _run_tile(FLOAT32, which, c_at, ldc, a_at, lda, pack, 4 * width, depth, accumulate, next_b, ldb)
        first += n


@jit
def integer_tile(tag, c, ldc, a, lda, b, rows, depth, group):
    """C[rows, 16] = A[rows, depth] @ B[depth, 16] for at most INTEGER_ROWS rows, see `digit_code`."""
    _run_tile(tag, tile_key(STREAM, COLUMNS, rows), c, ldc, a, lda, b, 0, depth, group, 0, 0)


@jit
def stream_rows(tag, size, c, ldc, a, lda, b, ldb, rows, columns, depth, next_b):
    """C += A @ B for few rows and any columns; B comes from memory, the B at next_b is prefetched."""
    done = 0
    while done < columns:
        width = stream_width(columns - done)
        for first in range(0, rows, TILE_ROWS):
            which = tile_key(STREAM, width, min(TILE_ROWS, rows - first))
            c_at, a_at, shift = c + first * ldc + 4 * done, a + first * lda, size * done
            _run_tile(tag, which, c_at, ldc, a_at, lda, b + shift, ldb, depth, 1, next_b + shift, 0)
        done += width


@jit
def key_scores(tag, c, ldc, a, lda, keys, second_keys, ldb, rows, depth, next_keys):
    """C[rows, KEYS] = A[rows, depth] @ K^T; half of the KEYS keys from each address; the next ones are prefetched."""
    _run_tile(tag, tile_key(SCORES, 0, 0), c, ldc, a, lda, keys, ldb, depth, rows, next_keys, second_keys)


@jit
def transpose_8(tag, c, ldc, b, ldb, depth):
    """C[depth, 8] = B[8, depth]^T in float32."""
    _run_tile(tag, tile_key(TRANSPOSE, 0, 0), c, ldc, 0, 0, b, ldb, depth, 0, 0, 0)


@jit
def widen(tag, c, b, count):
    """C[count] = B[count] in float32; count a multiple of 16."""
    _run_tile(tag, tile_key(WIDEN, 0, 0), c, 0, 0, 0, b, 0, count, 0, 0, 0)


@jit
def unpack(bits, c, words, codes, row_bytes, rows, depth, next_codes):
    """C[rows, depth] in float32 of packed codes, `row_bytes` a row, and a word each; the codes at next_codes are prefetched.

    depth: a multiple of 16 for 8 bits, of 32 for 4.
    """
    _run_tile(
        FLOAT32,
        tile_key(UNPACK, bits, 0),
        c,
        4 * depth,
        words,
        rows,
        codes,
        row_bytes,
        depth,
        0,
        next_codes,
        0,
    )
