"""Triton's kernel is the float64 recurrence, gradients included, as far as a machine without a GPU can tell."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_mlstm import NAMES
from triton_support import CASES, bound

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton"),
]
SHARED_MEMORY_OF_A_BLOCK = 227 << 10


@pytest.fixture(scope="module")
def interpreted():
    """What Triton's interpreter computes, in a process of its own."""
    program = Path(__file__).with_name("triton_support.py")
    found = subprocess.run(
        [sys.executable, str(program)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    return json.loads(found.stdout)


@pytest.mark.parametrize("name", CASES)
def test_output_state_and_gradients_are_those_of_the_recurrence(interpreted, name):
    assert set(interpreted[name]) == {"output", "last state", *NAMES}
    for tensor, error in interpreted[name].items():
        assert error <= bound(name), f"{tensor}: relative error {error:.1e}"


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="an interpreter compiles nothing")
@pytest.mark.parametrize("operand", ["fp32", "bf16"])
@pytest.mark.parametrize("width", [64, 128])
def test_the_kernels_compile_for_an_h200_and_fit_its_shared_memory(width, operand):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from xlstm_distill.model import triton_kernels as kernels
    from xlstm_distill.model import triton_mlstm as module

    language, tile = module.tl, module.LARGEST_TILE
    kind = {"fp32": language.float32, "bf16": language.bfloat16}[operand]
    sizes = {"D": width, "E": width, "L": module.LARGEST_CHUNK, "BD": tile[kind], "BE": tile[kind], "OPERAND": kind,
             "PRECISION": "tf32x3"}  # fmt: skip
    inputs = dict.fromkeys(("x", "y", "q", "k", "v", "du", "dq", "dk", "dv"), f"*{operand}")
    for kernel, constants, options in (
        (kernels.carry, {"REVERSE": False, "ones": None}, {"num_warps": 4, "num_stages": 2}),
        (kernels.carry, {"REVERSE": True}, {"num_warps": 4, "num_stages": 2}),
        (kernels.output, {}, {"num_warps": 8, "num_stages": 2}),
        (kernels.gradients, {}, {"num_warps": 8, "num_stages": 1}),
    ):
        constants = {**sizes, **constants}
        kinds = {**inputs, "T": "i32", "N": "i32", **dict.fromkeys(constants, "constexpr")}
        signature = {name: kinds.get(name, "*fp32") for name in kernel.arg_names}
        compiled = triton.compile(
            ASTSource(kernel, signature, constexprs=constants), target=GPUTarget("cuda", 90, 32), options=options
        )
        assert compiled.asm["cubin"]
        assert compiled.metadata.shared <= SHARED_MEMORY_OF_A_BLOCK
