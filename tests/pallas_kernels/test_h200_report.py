"""What is read from the compiler's reports."""

import pytest

from pallas_kernels._h200.report import Failure, Kernel, check_instruction, check_shared, kernels_of, read

ASSEMBLER = """ptxas info    : Compiling entry function 'page_attention_mosaic_gpu_kernel' for 'sm_90a'
    {} bytes stack frame, {} bytes spill stores, {} bytes spill loads
ptxas info    : Used {} registers, used 2 barriers, 1 bytes smem"""
RESOURCES = "Resources(smem_scratch_bytes={}, tmem_scratch_cols=0, barrier_counts=Counter())"
CODE = ".maxntid {}, 1, 1"


@pytest.mark.parametrize(
    ("registers", "shared", "threads", "blocks"),
    [
        (128, 109568, 128, 2),
        (129, 0, 128, 3),
        (247, 1024, 128, 2),
        (94, 38912, 128, 5),
        (32, 142336, 128, 1),
        (128, 0, 256, 2),
    ],
)
def test_blocks_per_processor(registers, shared, threads, blocks):
    kernel = read(ASSEMBLER.format(0, 0, 0, registers), RESOURCES.format(shared), CODE.format(threads))
    assert (kernel.registers, kernel.spilled, kernel.shared_bytes) == (registers, 0, shared)
    assert kernel.blocks_per_processor == blocks


def test_spills_are_seen():
    assert read(ASSEMBLER.format(104, 104, 96, 255), RESOURCES.format(0), CODE.format(128)).spilled == 104


def test_a_missing_or_unknown_report_is_a_failure(tmp_path):
    with pytest.raises(Failure, match="no Mosaic kernel"):
        kernels_of(tmp_path)
    (tmp_path / "a.ptxas").write_text("all fine")
    (tmp_path / "a.resources.txt").write_text(RESOURCES.format(0))
    (tmp_path / "a.ptx").write_text(CODE.format(128))
    with pytest.raises(Failure, match="reads differently: 'all fine'"):
        kernels_of(tmp_path)


def test_a_kernel_without_its_instruction_is_a_failure(tmp_path):
    (tmp_path / "a.ptx").write_text("wgmma.mma_async.sync.aligned.m64n16k32.s32.s8.s8 {%r1}, 1;")
    check_instruction(tmp_path, r"wgmma\.mma_async\S*\.s32\.s8\.s8")
    with pytest.raises(Failure, match="has no instruction"):
        check_instruction(tmp_path, "wgmma.*bf16")


def test_a_kernel_that_takes_more_shared_memory_than_it_says_is_a_failure():
    kernels = [Kernel(128, 0, shared, 128) for shared in (4096, 8193)]
    check_shared(kernels, 9)
    with pytest.raises(Failure, match="8193 bytes of shared memory, more than 8 KiB"):
        check_shared(kernels, 8)
