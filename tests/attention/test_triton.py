"""The Triton kernels equal the reference (triton_cases.py, runner_cases.py and fused_cases.py, in a process of their own) and
compile for NVIDIA GPUs."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import families
from kvgraph import models
from kvgraph.attention.backends import backend_for, reference
from kvgraph.attention.cuda import Tuning, tuning
from kvgraph.engine.runner import CudaRunner, Runner, runner_for
from kvgraph.models.adapter import Layer
from soak import SOAK

ROOT = Path(__file__).parents[2]


def build(kernel: Any, types: dict[str, str], architecture: int, constants: dict[str, Any], **options: int) -> Any:
    """A kernel compiled for a GPU's architecture. It needs no GPU. types: of its arguments; the others are constants."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    signature = {n: types.get(n, "constexpr") for n in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if "*" in signature[n]}
    source = ASTSource(kernel, signature, {(names.index(n),): v for n, v in constants.items()}, aligned)
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


def compiled(tune: Tuning, dim: int, architecture: int, dtype: str) -> Any:
    """The attention kernel compiled for a GPU's architecture, as its two smaller ones can be too."""
    import triton.language as tl

    from kvgraph.attention.backends import triton as backend

    kv, short = getattr(tl, dtype), {"float32": "fp32", "bfloat16": "bf16"}[dtype]
    types = dict.fromkeys("q out sinks k v".split(), "*" + short)
    types |= dict.fromkeys("partial partial_lse cos sin".split(), "*fp32") | dict.fromkeys(("scale", "softcap"), "fp32")
    types |= dict.fromkeys("tiles counts blocks pairs rows tokens entries more".split(), "*i64")
    types |= dict.fromkeys("which prefix slots q_head q_token k_head k_token v_head v_token".split(), "i32")

    def made(kernel: Any, **constants: Any) -> Any:
        return build(kernel, types, architecture, constants, num_warps=tune.warps[1], num_stages=tune.stages)

    sizes = {"D": dim, "DV": dim, "BLOCK_D": dim, "BLOCK_DV": dim, "KV": kv}
    made(backend.merge, H=32, DV=dim, BLOCK_DV=dim, READ=64, GROUPS=2, SINKS=True)
    made(backend.write, G=8, **sizes)
    return made(
        backend.attend, H=32, G=8, ROWS=tune.rows, KEYS=tune.keys, ROTATED=dim, INTERLEAVED=False, MASKED=True, SHARP=True,
        SOFTCAP=True, SINKS=True, **sizes,
    )  # fmt: skip


def needs_triton() -> None:
    if not find_spec("triton"):
        reason = "triton isn't installed, so its kernel is NOT checked: pip install triton==3.7.1"
        warnings.warn(reason, stacklevel=2)
        pytest.skip(reason)


# The kernels run compiled where there is a GPU; the GPU's runner always runs them in Triton's interpreter.
CASES = [(["triton_cases.py", "fused_cases.py"], "0"), (["runner_cases.py"], "1")]
if not torch.cuda.is_available():
    CASES = [(["triton_cases.py", "runner_cases.py", "fused_cases.py"], "1")]  # one process: to start one takes seconds


@pytest.mark.parametrize(("files", "interpret"), CASES)
def test_the_gpus_way_equals_the_plain_one(files, interpret):
    needs_triton()
    bare = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "--noconftest", "-o", "addopts="]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path), "TRITON_INTERPRET": interpret}
    env |= {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"} | ({"CUDA_VISIBLE_DEVICES": ""} if interpret == "1" else {})
    command = [sys.executable, *bare, *(ROOT / "tests" / "support" / file for file in files)]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout and "skipped" not in done.stdout, done.stdout


@pytest.mark.parametrize(
    ("architecture", "most", "dtype"),
    [(80, 99, "float32"), (90, 227, "bfloat16")] + SOAK * [(80, 99, "bfloat16"), (90, 227, "float32")],
)
def test_kernels_compile_within_a_gpus_limits(monkeypatch, architecture, most, dtype):
    """most: KiB of shared memory of a block, of the smallest GPU of compute capability 8 and of an H100."""
    needs_triton()
    with monkeypatch.context() as gpu:
        gpu.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6) if architecture == 80 else (9, 0))
        gpu.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=132))
        tune = tuning(128, getattr(torch, dtype), torch.device("cuda"))
    kernel = compiled(tune, 128, architecture, dtype)
    shared, ptx = kernel.metadata.shared, kernel.asm["ptx"]
    products = ptx.count("wgmma.mma") + ptx.count("mma.sync")
    assert shared <= most * 1024
    assert ptx.count("cp.async.cg") > 0  # 16 bytes at a time
    assert (products > 0) == (dtype == "bfloat16")  # tensor cores for 16 bits, IEEE products for 32


@pytest.mark.parametrize(("architecture", "dtype"), [(80, "fp16"), (80, "bf16"), (90, "bf16")])
def test_fused_kernels_compile_and_round_to_nearest(architecture, dtype):
    needs_triton()
    from kvgraph.attention.backends import elementwise

    types = dict.fromkeys("x weight out q k cos sin out_q out_k gate up".split(), "*" + dtype) | {"eps": "fp32"}
    types |= dict.fromkeys("stride heads groups q_head q_token k_head k_token angle_token n".split(), "i32")
    for kernel, constants in (
        (elementwise.rms_norm_kernel, {"N": 4096, "BLOCK": 4096}),
        (elementwise.rotary_kernel, {"D": 128, "BLOCK": 128}),
        (elementwise.gated_silu_kernel, {"BLOCK": 1024}),
    ):
        ptx = build(kernel, types, architecture, constants).asm["ptx"]
        assert f"cvt.rn.{dtype.replace('fp', 'f')}" in ptx


@pytest.mark.gpu
def test_triton_serves_cuda():
    needs_triton()
    model = models.wrap(families.build("llama").to("cuda"))
    assert isinstance(runner_for(model), CudaRunner)


def test_without_triton_the_plain_step_runs(monkeypatch):
    model = SimpleNamespace(device=torch.device("cuda"), layers=[Layer(0, None, 2, 16, 16)])
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr("kvgraph.engine.runner.find_spec", lambda name: None)
    assert type(runner_for(model)) is Runner
    assert backend_for(torch.device("cuda")) is reference.attend
