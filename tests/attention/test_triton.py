"""The Triton kernel equals the reference (triton_cases.py, in a process of its own) and compiles for NVIDIA GPUs."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import families
from kvgraph import models
from kvgraph.attention.backends import backend_for, reference
from kvgraph.attention.cuda import tuning
from kvgraph.engine.runner import CudaRunner, Runner, runner_for
from kvgraph.models.adapter import Layer
from soak import SOAK

ROOT = Path(__file__).parents[2]

# Compiles one specialisation of the attention kernel for a GPU's architecture, which needs no GPU.
COMPILE = """
import sys, triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from kvgraph.attention.backends import triton as backend

dim, rows, keys, warps, stages, architecture = map(int, sys.argv[1:7])
kv, short = getattr(tl, sys.argv[7]), {"float32": "fp32", "bfloat16": "bf16"}[sys.argv[7]]
constants = dict(H=32, G=8, D=dim, DV=dim, BLOCK_D=dim, BLOCK_DV=dim, ROWS=rows, KEYS=keys, KV=kv, ROTATED=dim,
                 INTERLEAVED=False, MASKED=True, SHARP=True, SOFTCAP=True, SINKS=True)
types = dict(q="*" + short, out="*" + short, sinks="*" + short, partial="*fp32", partial_lse="*fp32", tiles="*i64",
             counts="*i64", which="i32", blocks="*i64", pairs="*i64", cos="*fp32", sin="*fp32", prefix="i32", scale="fp32",
             softcap="fp32", q_head="i32", q_token="i32", slots="i32", k="*" + short, v="*" + short, rows="*i64",
             k_head="i32", k_token="i32", v_head="i32", v_token="i32", tokens="*i64", entries="*i64", more="*i64")
def build(kernel, constants):
    names = kernel.arg_names
    signature = {n: types.get(n, "constexpr") for n in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if "*" in signature[n]}
    source = ASTSource(kernel, signature, {(names.index(n),): v for n, v in constants.items()}, aligned)
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=dict(num_warps=warps, num_stages=stages))
attend = build(backend.attend, constants)
build(backend.merge, dict(H=32, DV=dim, BLOCK_DV=dim, READ=16, GROUPS=2, SINKS=True))
build(backend.write, dict(G=8, D=dim, DV=dim, BLOCK_D=dim, BLOCK_DV=dim, KV=kv))
ptx = attend.asm["ptx"]
print(attend.metadata.shared, ptx.count("cp.async.cg"), ptx.count("wgmma.mma") + ptx.count("mma.sync"))
"""


def needs_triton() -> None:
    if not find_spec("triton"):
        reason = "triton isn't installed, so its kernel is NOT checked: pip install triton==3.7.1"
        warnings.warn(reason, stacklevel=2)
        pytest.skip(reason)


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path), **environment}
    return subprocess.run([sys.executable, *arguments], env=env, cwd=ROOT, capture_output=True, text=True)


def test_kernel_equals_reference():
    needs_triton()
    interpret = "0" if torch.cuda.is_available() else "1"
    cases = str(ROOT / "tests" / "support" / "triton_cases.py")
    done = python("-m", "pytest", "-q", "-p", "no:cacheprovider", cases, TRITON_INTERPRET=interpret)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout and "skipped" not in done.stdout, done.stdout


def test_steps_of_the_gpu_runner_equal_the_plain_ones():
    needs_triton()
    cases = str(ROOT / "tests" / "support" / "runner_cases.py")
    done = python("-m", "pytest", "-q", "-p", "no:cacheprovider", cases, TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout and "skipped" not in done.stdout, done.stdout


@pytest.mark.parametrize(
    ("architecture", "most", "dtype"),
    [(80, 99, "float32"), (90, 227, "bfloat16")] + SOAK * [(80, 99, "bfloat16"), (90, 227, "float32")],
)
def test_kernels_compile_within_a_gpus_limits(monkeypatch, architecture, most, dtype):
    """most: KiB of shared memory of a block, of the smallest GPU of compute capability 8 and of an H100."""
    needs_triton()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6) if architecture == 80 else (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=132))
    tune = tuning(128, getattr(torch, dtype), torch.device("cuda"))
    sizes = map(str, (128, tune.rows, tune.keys, tune.warps[1], tune.stages, architecture))
    done = python("-c", COMPILE, *sizes, dtype, TRITON_INTERPRET="0")
    assert done.returncode == 0, done.stdout + done.stderr
    shared, vectors, products = map(int, done.stdout.split())
    assert shared <= most * 1024
    assert vectors > 0  # 16 bytes at a time
    assert (products > 0) == (dtype == "bfloat16")  # tensor cores for 16 bits, IEEE products for 32


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
