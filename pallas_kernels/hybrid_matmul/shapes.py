"""Named pairs of a product and decode attention, shared by tests and bench."""

from typing import NamedTuple

from pallas_kernels.int4_matmul.shapes import LowBitShape
from pallas_kernels.page_attention.shapes import ListShape


class Beside(NamedTuple):
    """`product` stands for the plain one of its rows, inputs and outputs as well."""

    product: LowBitShape
    attention: ListShape


SHAPES = {
    "llama3_8b_gate_up": Beside(LowBitShape(2048, 4096, 28672), ListShape(32, 8, 128, 16, (2048,) * 128, 1)),
    "llama3_8b_down": Beside(LowBitShape(1024, 14336, 4096), ListShape(32, 8, 128, 16, (4096,) * 64, 1)),
    "llama3_8b_quest": Beside(LowBitShape(1024, 4096, 28672), ListShape(32, 8, 128, 16, (2048,) * 128, 8)),
    "llama3_8b_page_32": Beside(LowBitShape(512, 4096, 28672), ListShape(32, 8, 128, 32, (4096,) * 64, 1)),
    "llama3_8b_unpaired": Beside(LowBitShape(384, 4096, 28672), ListShape(32, 8, 128, 16, (2048,) * 64, 1)),
    "llama2_7b_gate_up": Beside(LowBitShape(512, 4096, 22016), ListShape(32, 32, 128, 16, (1024,) * 32, 1)),
}

# Small enough for the simulator of the GPU: both, either alone, or nothing at all.
SIMULATED = {
    "both": Beside(LowBitShape(130, 256, 256), ListShape(4, 2, 64, 16, (300, 17), 1)),
    "many_steps": Beside(LowBitShape(64, 1152, 128), ListShape(4, 2, 128, 16, (70, 0), 1)),
    "chosen": Beside(LowBitShape(40, 256, 128), ListShape(4, 2, 128, 32, (130, 64), 2)),
    "queues": Beside(LowBitShape(130, 128, 1280), ListShape(4, 2, 64, 16, (530, 70, 0, 200), 1)),
    "product_alone": Beside(LowBitShape(130, 256, 256), ListShape(4, 1, 64, 16, (), 1)),
    "attention_alone": Beside(LowBitShape(0, 256, 128), ListShape(3, 1, 64, 16, (300, 17), 1)),
    "nothing": Beside(LowBitShape(0, 256, 128), ListShape(3, 1, 64, 16, (), 1)),
}
