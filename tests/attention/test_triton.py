"""The Triton kernel equals the reference (triton_cases.py, in a process of its own) and compiles for NVIDIA GPUs."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from kvgraph.attention.backends import backend_for

ROOT = Path(__file__).parents[2]

# Compiles one specialisation of the attention kernel for compute capability 8.0, which needs no GPU.
COMPILE = """
import sys, triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from kvgraph.attention.backends import triton as backend

dim, rows, kv = int(sys.argv[1]), int(sys.argv[2]), getattr(tl, sys.argv[3])
large, keys = backend._tile_size(dim)
constants = dict(R=4, D=dim, DV=dim, BLOCK_D=dim, BLOCK_DV=dim, ROWS=min(rows, large), KEYS=keys, KV=kv,
                 ALIGNED=128 // kv.primitive_bitwidth, MASKED=True, SOFTCAP=True)
types = dict(q="*fp32", out="*fp32", lse="*fp32", partial="*fp32", partial_lse="*fp32", addresses="*i64", tiles="*i64",
             scale="fp32", softcap="fp32", q_head="i32", q_column="i32", columns="i32", slots="i32")
def build(kernel, types, constants):
    names = kernel.arg_names
    signature = {n: types.get(n, "constexpr") for n in names}
    source = ASTSource(kernel, signature, {(names.index(n),): value for n, value in constants.items()})
    return triton.compile(source, target=GPUTarget("cuda", 80, 32), options=dict(num_warps=backend.WARPS))
attend = build(backend._attend, types, constants)
build(backend._merge, {**types, "merges": "*i64"}, dict(R=4, DV=dim, BLOCK_DV=dim, SPLITS=16))
print(attend.metadata.shared, attend.asm["ptx"].count("cp.async.cg"))
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


@pytest.mark.parametrize("dim, rows, dtype", [(128, 64, "bfloat16"), (256, 16, "float32")])
def test_kernel_compiles_within_a_gpus_limits(dim, rows, dtype):
    needs_triton()
    done = python("-c", COMPILE, str(dim), str(rows), dtype, TRITON_INTERPRET="0")
    assert done.returncode == 0, done.stdout + done.stderr
    shared, vectors = map(int, done.stdout.split())
    assert shared <= 99 * 1024  # what the smallest GPU of compute capability 8 has a block
    assert vectors > 0  # 16 bytes at a time


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_triton_serves_cuda():
    needs_triton()
    assert backend_for(torch.device("cuda")).__module__ == "kvgraph.attention.backends.triton"


def test_without_triton_cuda_uses_the_reference(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr("kvgraph.attention.backends.find_spec", lambda name: None)
    assert backend_for(torch.device("cuda")).__module__ == "kvgraph.attention.backends.reference"
