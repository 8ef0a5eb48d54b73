"""Matrices in the order of CPU kernels, and quantised ones: the numbers they give, and who may have them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import families
from kvgraph import ContextGraph, Engine, ModelError, models
from kvgraph.engine.engine import load_model
from kvgraph.models import matrices

pytestmark = pytest.mark.filterwarnings("ignore:this model doesn't declare tuning")
SIZES = {"vocab_size": 320, "intermediate_size": 96, "max_position_embeddings": 4096}


def linear(outputs: int, inputs: int, bias: bool) -> nn.Linear:
    torch.manual_seed(outputs + inputs)
    return nn.Linear(inputs, outputs, bias=bias).to(torch.bfloat16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small model in bfloat16."""
    found = tmp_path_factory.mktemp("matrices")
    models.save(families.build("Llama", **SIZES), found, dtype=torch.bfloat16)
    return found


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("outputs", "inputs"), [(64, 32), (192, 64), (128, 96)])
@torch.inference_mode()
def test_ordered_matrices_give_the_same_numbers(outputs, inputs, bias):
    plain = linear(outputs, inputs, bias)
    ordered = matrices.Ordered(plain)
    for shape in ((1, 1), (1, 7), (2, 40)):
        x = torch.randn(*shape, inputs).bfloat16()
        torch.testing.assert_close(ordered(x), plain(x), atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("kind", "worst"), [(matrices.EightBits, 0.01), (matrices.FourBits, 0.15)])
@torch.inference_mode()
def test_quantised_matrices_multiply_by_what_they_say(kind, worst, bias):
    """Few rows and many take different ways; `matrix` says what both multiply by."""
    plain = linear(128, 96, bias)
    quantised = kind(plain)
    exact = quantised.matrix(torch.float32)
    error = (exact - plain.weight.float()).abs().max() / plain.weight.float().abs().max()
    assert 0 < error < worst
    for rows in (1, kind.few, kind.few + 1, 100):
        x = torch.randn(2, rows, 96).bfloat16() if rows == 100 else torch.randn(1, rows, 96).bfloat16()
        expected = nn.functional.linear(x.float(), exact, plain.bias.float() if bias else None)
        torch.testing.assert_close(quantised(x).float(), expected, atol=0.02, rtol=0.02)
        assert quantised(x).dtype == torch.bfloat16


def test_int4_keeps_what_has_four_bits():
    """A group whose numbers are a scale times 0 to 15 plus a lowest one, as in GGUF's Q4_1, stays as it is."""
    plain = nn.Linear(64, 64, bias=False)
    codes = torch.randint(0, 16, (64, 64))
    codes[:, ::32], codes[:, 1::32] = 0, 15
    with torch.no_grad():
        plain.weight.copy_(codes * 0.25 - 2.0)
    assert torch.equal(matrices.FourBits(plain).matrix(torch.float32), plain.weight.detach())


@pytest.mark.parametrize("bits", [None, *matrices.BITS])
def test_a_model_passes_the_gate_and_answers_as_its_dense_reference(bits, folder):
    """Loading runs the gate. The reference has the same matrices and transformers' attention."""
    engine = Engine.load(folder, quantize=bits, allow_untested=False, kv_budget=1 << 26)
    graph = ContextGraph([list(range(40)), list(range(50, 80))], query=[5, 6, 7])
    plan = engine.plan(graph, "block")
    dense = plan.dense()
    expected = engine.model.dense(*map(torch.from_numpy, (dense.tokens, dense.positions, dense.visible)))[-1]
    found = engine.logits(plan)
    assert float((found - expected).abs().max() / expected.std()) < 0.3
    kinds = {type(m).__name__ for m in engine.model.hf.modules()}
    assert {"int8": "EightBits", "int4": "FourBits", None: "Ordered"}[bits] in kinds or not matrices.multiplies_bf16()
    assert engine.model.parameters == sum(p.numel() for p in models.load(folder).hf.parameters())


@pytest.mark.parametrize("family", families.FAMILIES)
@torch.inference_mode()
def test_every_family_runs_with_other_matrices(family):
    """No model's code may look for the weights of its linear layers."""
    tokens = torch.arange(20)[None] * 7 % 60
    plain, quantised = (families.FAMILIES[family]().to(torch.bfloat16).eval() for _ in range(2))
    before = plain(tokens).logits.float()
    matrices.order(plain)
    assert float((plain(tokens).logits.float() - before).abs().max() / before.std()) < 0.05
    matrices.quantise(quantised, "int8")
    assert float((quantised(tokens).logits.float() - before).std() / before.std()) < 0.2


def test_quantised_models_have_records_of_their_own(folder, tmp_path):
    graph = ContextGraph([list(range(40))], query=[5, 6, 7])
    fingerprints = set()
    for bits in (None, *matrices.BITS):
        for expected in ({}, {"disk": 40}):
            with Engine.load(folder, quantize=bits, store=tmp_path / "kv") as engine:
                assert engine.generate(graph, "block", max_tokens=2).usage.reused_tokens == expected
                fingerprints.add(engine.fingerprint)
    assert len(fingerprints) == 3


def test_the_output_layer_keeps_its_numbers(folder):
    hf = models.load(folder, quantize="int4").hf
    assert isinstance(hf.lm_head, nn.Linear) and isinstance(
        hf.model.layers[0].mlp.up_proj, nn.Linear | matrices.FourBits
    )
    assert not any(type(m) is nn.Linear and m.out_features % 64 == 0 for m in hf.model.modules())


def test_a_processor_without_bfloat16_multiplies_many_rows_in_float32(folder, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True})
    assert matrices.EightBits(linear(64, 64, False)).wide == torch.float32
    assert not any(isinstance(m, matrices.Ordered) for m in load_model(folder).hf.modules())
    assert load_model(folder, quantize="int8").dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"quantize": "int5"}, "quantize int5 isn't supported; use int8 or int4, or leave it out"),
        ({"quantize": "int8", "dtype": "float32"}, "quantize int8 goes with bfloat16; leave out dtype float32"),
    ],
)
def test_what_cannot_be_quantised_is_refused_before_anything_is_read(options, line, tmp_path):
    with pytest.raises(ModelError, match=line):
        models.load(tmp_path / "nowhere", **options)


def test_gpus_are_refused():
    with pytest.raises(ModelError, match="quantize int4 runs on CPUs only"):
        matrices.checked("int4", "auto", torch.device("cuda"))
