"""What the compilers dump of a kernel is read right; from small dumps written here."""

from pathlib import Path

import pytest

from benchmarks import gpu_static, tpu_static
from benchmarks.compiling import CompileFailed, Job, Refused, compiled

SLOTS = "MATMUL, MATPUSH, XLU, VALU, VPOP, EUP, VLOAD, VLOAD:FILL, VSTORE, VSTORE:SPILL, SALU"
TREE = """\
$region0: #{decode.1}
  #allocation3 [shape = 'bf16[2,64,16,128]{3,2,1,0:T(8,128)(2,1)}', space=vmem, size = 0x80000, \
offset = 0, scoped, tag = 'scratch operand']
  #allocation5 [shape = 'f32[8,128]{1,0}', space=vmem, size = 0x1000, scoped, tag = 'other']
  #allocation8 [shape = 'u8[512]{0}', space=smem, size = 512, offset = 0, tag = 'prefetched']
  // region range: [0, 20)
  $region1: #{decode.1} parent=0 // loop_body
    // region range: [2, 18)
    $region2: #{decode.1} parent=1 // loop_body
      // region range: [4, 6)
    $region3: #{decode.1} parent=1 // pred_region
      // region range: [10, 16)
      $region4: #{decode.1} parent=3 // loop_body
        // region range: [11, 15)
"""


def write_tpu_dumps(folder: Path, name: str = "decode.1") -> None:
    """20 cycles: a loop of 16: copies in [4, 6), work in 7 and 8, and rarely in [11, 15)."""
    rows = []
    for cycle in range(20):
        matmul = 2 if cycle in (7, 8, 12) else 0
        fill, spill = (1, 0) if cycle == 7 else (0, 1 if cycle == 8 else 0)
        rows.append(f"{matmul} 0 0 4 0 0 {fill} {fill} {spill} {spill} 1")
    lines = ["== CAPACTIY:", SLOTS, "4 4 3 4 2 1 3 3 1 1 2", "== UTILIZATION:", *rows]
    bundles = []
    for cycle in range(20):
        issued = "%1 = dma.hbm_to_vmem [thing]" if cycle in (4, 5) else "%2 = vadd"
        bundles.append(f"  {hex(cycle) if cycle else '0'}  :  {{ {issued} }}")
    dumps = {
        "02-post-bundle-packing-post-ra": TREE,
        "03-pre-delay_hlo-static-per-bundle-utilization": "\n".join(lines),
        "01-packed-bundles-post-ra": "\n".join(["= control target key start", *bundles]),
        "00-schedule-analysis_packed-bundles-post-ra": "0x1 : { }",
        "06-final_bundles": "\n".join(bundles[:12]),
    }
    for label, text in dumps.items():
        (folder / f"123-{name}-{label}.txt").write_text(text + "\n")


def test_a_tpu_schedule_is_read_loop_by_loop(tmp_path: Path) -> None:
    write_tpu_dumps(tmp_path)
    (kernel,) = tpu_static.parse(tmp_path, "v5e")
    assert (kernel.name, kernel.whole.cycles, kernel.num_bundles) == ("decode.1", 20, 12)
    assert (kernel.vmem_bytes, kernel.smem_bytes) == (0x80000 + 0x1000, 512)
    assert (kernel.num_fills, kernel.num_spills) == (1, 1)
    assert [(loop.depth, loop.cycles, loop.self_cycles) for loop in kernel.loops] == [
        (0, 16, 10),
        (1, 2, 2),
        (1, 4, 4),
    ]
    assert kernel.loops[0].num_dma_in == 2
    assert kernel.loops[0].use["VALU"] == 1.0


def test_the_common_path_of_a_block_leaves_out_rare_branches_that_loop(tmp_path: Path) -> None:
    write_tpu_dumps(tmp_path)
    (kernel,) = tpu_static.parse(tmp_path, "v5e")
    loop = kernel.block_loop
    assert loop is not None
    assert loop is kernel.loops[0]
    assert (loop.straight_cycles, loop.straight_matmuls) == (16 - 6, 4)
    assert kernel.block_bytes == 0x40000


def test_dumps_that_do_not_fit_each_other_are_an_error(tmp_path: Path) -> None:
    write_tpu_dumps(tmp_path)
    path = tmp_path / "123-decode.1-03-pre-delay_hlo-static-per-bundle-utilization.txt"
    path.write_text("\n".join(path.read_text().splitlines()[:-5]))
    with pytest.raises(ValueError, match="20 bundles, but 15 rows"):
        tpu_static.parse(tmp_path, "v5e")
    path.write_text(path.read_text().replace("MATPUSH", "PUSH"))
    with pytest.raises(ValueError, match="slots"):
        tpu_static.parse(tmp_path, "v5e")


def test_hbm_cycles_are_bytes_over_bandwidth_times_clock() -> None:
    assert tpu_static.hbm_cycles("v5e", 819e9) == pytest.approx(1.5e9)


def test_gpu_resources_are_read_kernel_by_kernel(tmp_path: Path) -> None:
    for number, registers in ((0, 138), (10, 90), (2, 64)):
        (tmp_path / f"decode_{number}.ptxas").write_text(
            "ptxas info    : Compiling entry function 'decode_mosaic_gpu_kernel' for 'sm_90a'\n"
            "    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads\n"
            f"ptxas info    : Used {registers} registers, used 2 barriers, 1 bytes smem, 8 bytes\n"
        )
        (tmp_path / f"decode_{number}.resources.txt").write_text(
            "Resources(smem_scratch_bytes=4096, tmem_scratch_cols=128, barrier_counts=Counter({"
            "Barrier(arrival_count=512, num_barriers=2, orders_tensor_core=False): 2, "
            "Barrier(arrival_count=1, num_barriers=3, orders_tensor_core=False): 1}))"
        )
    kernels = gpu_static.parse(tmp_path, "h100")
    assert [kernel.num_registers for kernel in kernels] == [138, 64, 90]
    assert kernels[0] == gpu_static.Kernel(
        name="decode",
        target="h100",
        architecture="sm_90a",
        num_registers=138,
        spill_store_bytes=4,
        spill_load_bytes=12,
        stack_bytes=8,
        smem_bytes=4097,
        num_barriers=7,
        num_named_barriers=2,
        tmem_columns=128,
    )


def test_a_dump_that_reads_otherwise_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "decode_0.ptxas").write_text("ptxas fatal   : no such thing\n")
    with pytest.raises(ValueError, match="no such thing"):
        gpu_static.parse(tmp_path, "h100")


# Programs for the tests below; `benchmarks.compiling` finds them by name.


def refusing(target: object) -> None:
    from pallas_kernels.backend import BackendRefused

    raise BackendRefused("page_size=5")


def failing(target: object) -> None:
    raise KeyError("no such case")


def hanging(target: object) -> None:
    import time

    time.sleep(600)


def crashing(target: object) -> None:
    import os

    os.abort()


def job(function: str) -> Job:
    return Job.of("v5e", f"tests.test_static_figures:{function}")


@pytest.fixture
def compilers() -> None:
    import os

    from benchmarks.compiling import why_not

    missing = why_not("v5e")
    if missing:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(missing)


@pytest.mark.usefixtures("compilers")
def test_a_refusal_is_told_apart_from_a_failure() -> None:
    with pytest.raises(Refused, match="page_size=5"), compiled(job("refusing")):
        pass
    with pytest.raises(CompileFailed, match="no such case") as failure, compiled(job("failing")):
        pass
    assert not failure.value.crashed
    assert not failure.value.timed_out


@pytest.mark.usefixtures("compilers")
def test_a_compile_that_hangs_or_crashes_ends_and_is_tried_again() -> None:
    with (
        pytest.raises(CompileFailed, match="not compiled after 8 s") as failure,
        compiled(job("hanging"), time_limit_s=8),
    ):
        pass
    assert failure.value.timed_out
    with (
        pytest.raises(CompileFailed, match="exit status -6") as failure,
        compiled(job("crashing"), retries=1),
    ):
        pass
    assert failure.value.crashed
