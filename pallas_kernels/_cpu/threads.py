"""Spreads the items of one call over the calling thread and XLA's thread pool.

The caller takes part and needs nobody: it can do every item itself, so a pool that never runs our tasks only costs
speed. A task that starts late finds no item left; the block it looks at is freed by whoever leaves last.

The block, in int64 words: references, next item, items done, ends of four phases, workers so far, then the words of
the job. An item of a phase starts only after all items of the phases before are done.
"""

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from pallas_kernels._cpu.frame import frame_api, frame_context
from pallas_kernels._cpu.memory import I64, free, jit, load_i64, malloc, pointer, store_i64, yield_thread

PHASES = 4
REFERENCES, NEXT, DONE, ENDS, WORKERS, JOB = 0, 8, 16, 24, 24 + 8 * PHASES, 32 + 8 * PHASES

# Offsets in XLA_FFI_Api, and the struct_size that has them.
ERROR_DESTROY, SCHEDULE, NUM_THREADS, API_SIZE = 64, 136, 144, 152


@intrinsic
def atomic_add(typingctx, address, value):
    """Adds and returns the old value."""

    def codegen(context, builder, signature, args):
        return builder.atomic_rmw("add", pointer(builder, args[0], I64), args[1], "acq_rel")

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def atomic_load(typingctx, address):
    def codegen(context, builder, signature, args):
        return builder.load_atomic(pointer(builder, args[0], I64), "acquire", 8)

    return types.int64(types.int64), codegen


@intrinsic
def _call_api(typingctx, function, args_struct):
    """XLA_FFI_Error* function(Args*)"""

    def codegen(context, builder, signature, args):
        return builder.call(pointer(builder, args[0], ir.FunctionType(I64, [I64])), [args[1]])

    return types.int64(types.int64, types.int64), codegen


def task_address(worker):
    """An intrinsic that gives the address of `worker` (a numba function of one int64) as a C function.

    The address is taken inside the compiled module, never baked in, so that numba can cache the code.
    """

    @intrinsic
    def address(typingctx):
        def codegen(context, builder, signature, args):
            parameters = (types.int64,)
            worker.compile(parameters)
            compiled = worker.overloads[parameters]
            context.add_linking_libs((compiled.library,))
            name = f"task_{compiled.fndesc.mangled_name}"
            task = ir.Function(builder.module, ir.FunctionType(ir.VoidType(), [I64]), name)
            task.linkage = "internal"
            inner = ir.IRBuilder(task.append_basic_block())
            context.call_internal_no_propagate(inner, compiled.fndesc, compiled.signature, [task.args[0]])
            inner.ret_void()
            return builder.ptrtoint(task, I64)

        return types.int64(), codegen

    return address


@jit
def pool_threads(frame):
    """Threads of XLA's pool; 0 where there is none."""
    api = frame_api(frame)
    if load_i64(api) < API_SIZE:
        return 0
    args = malloc(40)
    store_i64(args, 32)
    store_i64(args + 8, 0)
    store_i64(args + 16, frame_context(frame))
    store_i64(args + 24, args + 32)
    store_i64(args + 32, 0)
    error = _call_api(load_i64(api + NUM_THREADS), args)
    count = load_i64(args + 32)
    if error != 0:
        _destroy_error(api, error)
        count = 0
    free(args)
    return count


@jit
def _destroy_error(api, error):
    args = malloc(24)
    store_i64(args, 24)
    store_i64(args + 8, 0)
    store_i64(args + 16, error)
    _call_api(load_i64(api + ERROR_DESTROY), args)
    free(args)


@jit
def new_block(job_words):
    """A block with no items yet, held by the caller."""
    block = malloc(JOB + 8 * job_words)
    for offset in range(0, JOB, 8):
        store_i64(block + offset, 0)
    store_i64(block + REFERENCES, 1)
    return block


@jit
def set_phases(block, first, second, third, fourth):
    """Numbers of items of the phases."""
    store_i64(block + ENDS, first)
    store_i64(block + ENDS + 8, first + second)
    store_i64(block + ENDS + 16, first + second + third)
    store_i64(block + ENDS + 24, first + second + third + fourth)


@jit
def take_item(block, item):
    """Next item, or -1; `item` is the one just finished, or -1. Waits for the phases before the item's own."""
    if item >= 0:
        atomic_add(block + DONE, 1)
    item = atomic_add(block + NEXT, 1)
    if item >= load_i64(block + ENDS + 8 * (PHASES - 1)):
        return -1
    for phase in range(PHASES - 1):
        end = load_i64(block + ENDS + 8 * phase)
        if item >= end:
            _wait_done(block, end)
    return item


@jit
def worker_number(block):
    return atomic_add(block + WORKERS, 1)


@jit
def release(block):
    if atomic_add(block + REFERENCES, -1) == 1:
        free(block)


@jit
def _wait_done(block, count):
    # Whoever took those items is running them, so the wait is short; yield in case we hold its core.
    spins = 0
    while atomic_load(block + DONE) < count:
        spins += 1
        if spins > 2000:
            yield_thread()


@jit
def invite(frame, block, task, helpers):
    """Asks the pool for up to `helpers` runs of `task(block)`, each of which must end with `release(block)`."""
    api = frame_api(frame)
    args = malloc(40)
    for _ in range(helpers):
        atomic_add(block + REFERENCES, 1)
        store_i64(args, 40)
        store_i64(args + 8, 0)
        store_i64(args + 16, frame_context(frame))
        store_i64(args + 24, task)
        store_i64(args + 32, block)
        error = _call_api(load_i64(api + SCHEDULE), args)
        if error != 0:
            _destroy_error(api, error)
            atomic_add(block + REFERENCES, -1)
            break
    free(args)


@jit
def finish(block):
    """The caller's last step, after its own run found no item: waits for the others, lets go of the block."""
    _wait_done(block, load_i64(block + ENDS + 8 * (PHASES - 1)))
    release(block)
