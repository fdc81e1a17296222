"""The Triton kernels compile for the cards they are made for, and no product is fused with a sum.

Needs no card, as Triton carries its own assembler; and a process of its own, as kernels are interpreted in this one.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the package triton is missing; it comes with the dev extra on Linux")

COMPILE = r"""
import json, re, sys
import triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from longfit.kernels.triton import weights_4bit as triton_4bit
from longfit.kernels.triton import blockwise_8bit as triton_8bit
from longfit.kernels.triton import adamw as triton_adamw
from longfit.kernels.triton import linear_4bit as triton_linear

FLOATS = {"out", "x", "y", "values"}
POINTERS = {
    "codes": "*u8", "scales": "*u8", "nested": "*u8", "offset": "*u8", "packed": "*u8", "code_of_rank": "*u8",
    "table": "*i64", "first_chunks": "*i64",
    **dict.fromkeys(("levels", "scale_levels", "absmax", "thresholds", "scalars"), "*fp32"),
    **dict.fromkeys((f"{sign}signed_{kind}" for sign in ("", "un") for kind in ("levels", "thresholds")), "*fp32"),
}

def build(kernel, capability, float_type, **constants):
    names = kernel.arg_names
    pointers = POINTERS | dict.fromkeys(FLOATS, "*" + float_type)
    kinds = {n: "constexpr" if n in constants else pointers.get(n, "i64") for n in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n not in constants and n != "offset"}
    source = triton.compiler.ASTSource(fn=kernel, signature=kinds, constexprs=constants, attrs=aligned)
    target = GPUTarget("cuda", capability, 32)
    ptx = triton.compile(source, target=target, options={"enable_fp_fusion": False}).asm["ptx"]
    found = sorted(set(re.findall(r"(?:fma|div|sqrt|rcp)\.[\w.]*f32|(?:ld|st)\.global\.v\d|mma\.sync", ptx)))
    print(json.dumps([kernel.__module__.split(".")[-1] + "." + kernel.__name__, capability, found]), flush=True)

weight = {"BLOCK_SIZE": 64, "ABSMAX_BLOCK_SIZE": 256, "DOUBLE_QUANT": True}
build(triton_4bit._quantize, 80, "bf16", BLOCK_SIZE=64, NUM_BLOCKS=32)
# At a launch, Triton takes an argument that is 1 for a constant.
one = {"numel": 1, "num_pairs": 1}
build(triton_4bit._quantize, 80, "fp32", BLOCK_SIZE=4096, NUM_BLOCKS=1, **one)
build(triton_4bit._dequantize, 80, "fp32", **weight | {"DOUBLE_QUANT": False}, NUM_BLOCKS=32, blocks_per_row=1, **one)
build(triton_8bit._quantize, 80, "fp32", BITS=8, NUM_BLOCKS=1024, WIDTH=1, numel=1, block_size=1)
build(triton_linear._linear, 80, "fp32", **weight | {"BLOCK_SIZE": 4096}, ROWS=16, OUTPUTS=32, COLUMNS=256, num_rows=1)
for capability, float_type in ((75, "fp16"), (90, "bf16")):
    build(triton_4bit._dequantize, capability, float_type, **weight, NUM_BLOCKS=32)
    build(triton_linear._linear, capability, float_type, **weight, ROWS=16, OUTPUTS=32, COLUMNS=256)
build(triton_8bit._quantize, 80, "fp32", BITS=8, NUM_BLOCKS=4, WIDTH=256)
build(triton_8bit._dequantize, 80, "fp32", BLOCK_SIZE=256, WIDTH=1024)
step = {"RUN_BITS": 5, "NUM_BLOCKS": 4, "BLOCK": 256}
single = step | {"RUN_BITS": 0, "num_runs": 1}
build(triton_adamw._step, 75, "fp32", PARAM=tl.float16, GRAD=tl.float16, EIGHT_BITS=False, MASTER=True, **single)
build(triton_adamw._step, 75, "fp32", PARAM=tl.float32, GRAD=tl.float32, EIGHT_BITS=False, MASTER=False, **step)
build(triton_adamw._step, 80, "fp32", PARAM=tl.bfloat16, GRAD=tl.bfloat16, EIGHT_BITS=True, MASTER=False, **step)
"""


@pytest.fixture(scope="module")
def instructions(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, int, set[str]]]:
    """Of every kernel: name, compute capability, the instructions that matter here."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {
        "PYTHONPATH": str(Path(__file__).parents[3] / "src"),
        "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")),
    }
    run = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    lines = [json.loads(line) for line in run.stdout.splitlines()]
    return [(name, capability, set(found)) for name, capability, found in lines]


def test_all_compile(instructions: list[tuple[str, int, set[str]]]) -> None:
    assert len(instructions) == 14
    assert {capability for _, capability, _ in instructions} == {75, 80, 90}


def test_every_operation_is_rounded_by_itself(instructions: list[tuple[str, int, set[str]]]) -> None:
    for name, _, found in instructions:
        exact = {"div.rn.f32", "sqrt.rn.f32"}
        arithmetic = {instruction for instruction in found if instruction.endswith("f32")}
        if name != "linear_4bit._linear":  # its sum may be in any order, and is fused on cards without mma for it
            assert arithmetic <= exact, f"{name}: {arithmetic - exact}"
    steps = [found for name, _, found in instructions if name == "adamw._step"]
    assert all({"div.rn.f32", "sqrt.rn.f32"} <= found for found in steps)


def test_bytes_move_many_at_a_time(instructions: list[tuple[str, int, set[str]]]) -> None:
    for name, capability, found in instructions:
        if name == "triton_4bit._dequantize" and capability != 80:  # that one is of a single weight
            assert {"ld.global.v2", "st.global.v4"} <= found
