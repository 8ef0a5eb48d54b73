"""GGUF files and LoRA adapters as models: the numbers they give, what tells them apart, and what is refused."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import gguf
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from peft import LoraConfig, PeftModel, TrainableTokensConfig, get_peft_model
from safetensors.torch import load_file, save_file

import families
import gguf_files
from kvgraph import ContextGraph, Engine, ModelError, models
from kvgraph.models import converted
from kvgraph.models import gguf as reading
from kvgraph.models.adapters import WEIGHTS
from kvgraph.models.fingerprint import file_hash

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed"),
    pytest.mark.filterwarnings("ignore:this model doesn't declare tuning"),
]
SIZES = {"vocab_size": 320, "intermediate_size": 96, "max_position_embeddings": 4096}
TOKENS = torch.arange(40)[None] * 7 % 320
FAMILIES = {"llama": ("Llama", {}), "qwen2": ("Qwen2", {}), "qwen3": ("Qwen3", {"head_dim": 128})}  # it has no other


def build(family: str = "Llama", **changes):
    return families.build(family, **SIZES | changes)


def logits(model: models.Model) -> torch.Tensor:
    with torch.no_grad():
        return model.hf(TOKENS).logits


# -- GGUF ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Kind.F32, Kind.Q8_0, Kind.Q4_1])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_gguf_file_is_the_model_with_these_weights(family, kind, tmp_path):
    """Against the same weights put into a model by hand, and against that model saved as safetensors."""
    name, changes = FAMILIES[family]
    hf = build(name, **changes)
    kept = gguf_files.write(hf, tmp_path / "m.gguf", kind)
    hf.load_state_dict({name: torch.from_numpy(array) for name, array in kept.items()}, strict=False)
    found = models.load(tmp_path / "m.gguf", dtype="float32")
    with torch.no_grad():
        torch.testing.assert_close(logits(found), hf(TOKENS).logits, atol=2e-5, rtol=1e-5)
    models.save(found.hf, tmp_path / "saved", found.tokenizer)
    saved = models.load(tmp_path / "saved")
    assert saved.dtype == torch.float32
    torch.testing.assert_close(logits(saved), logits(found), atol=1e-5, rtol=0)
    assert saved.fingerprint != found.fingerprint == models.load(tmp_path / "m.gguf", dtype="float32").fingerprint
    assert saved.tokenizer.encode("hello") == found.tokenizer.encode("hello")


def test_a_folder_with_a_gguf_file_is_the_file(tmp_path):
    gguf_files.write(build(), tmp_path / "m.gguf", Kind.Q8_0)
    file, folder = models.load(tmp_path / "m.gguf"), models.load(tmp_path)
    wanted = reading.dequantised_dtype(torch.device("cpu"))
    assert file.fingerprint == folder.fingerprint and file.dtype == folder.dtype == wanted
    assert file.limit == 4096 and file.eos_ids == (1,)
    asked = file.tokenizer.apply_chat_template([{"role": "user", "content": "hell"}], tokenize=False)
    assert asked == "<user>hell" and models.load_tokenizer(tmp_path).chat_template == gguf_files.TEMPLATE
    gguf_files.write(build(), tmp_path / "n.gguf")
    with pytest.raises(ModelError, match=r"several GGUF files \(m.gguf, n.gguf\); give one"):
        models.load(tmp_path)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 1\n"


@pytest.mark.parametrize(
    ("data", "line"),
    [
        (b"", "m.gguf is empty"),
        (b"GGUF", "m.gguf ends within its header; download it again"),
        (b"<!DOCTYPE html>" + bytes(50), "m.gguf is no GGUF file"),
        (POINTER, "Git LFS pointer in place of m.gguf"),
        (b"GGUF\3\0\0\0" + bytes([2] + [0] * 7) * 2, "m.gguf ends within its header; download it again"),
    ],
    ids=["nothing", "cut", "page", "pointer", "counts"],
)
def test_a_gguf_file_that_is_none_is_refused_in_one_line(data, line, tmp_path):
    (tmp_path / "m.gguf").write_bytes(data)
    for name in (tmp_path / "m.gguf", tmp_path):
        with pytest.raises(ModelError, match=line) as refused:
            models.load(name)
        assert "\n" not in str(refused.value) and "unpack" not in str(refused.value)


def test_a_gguf_file_beside_a_config_is_named(tmp_path):
    gguf_files.write(build(), tmp_path / "m.gguf")
    build().config.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"no model.safetensors; give its GGUF file, .*m\.gguf"):
        models.load(tmp_path)


def test_an_adapter_of_a_base_that_is_not_there_is_named(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "/no/such/base"}')
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match=r"holds an adapter of /no/such/base: there is no folder /no/such/base"):
        models.load(tmp_path)


def test_what_is_not_quantised_keeps_its_dtype_and_other_bytes_are_another_model(tmp_path):
    gguf_files.write(build(), tmp_path / "a.gguf")
    gguf_files.write(families.build("Llama", **SIZES | {"initializer_range": 0.1}), tmp_path / "b.gguf")
    a, b = models.load(tmp_path / "a.gguf"), models.load(tmp_path / "b.gguf")
    assert a.dtype == torch.float32 and a.fingerprint != b.fingerprint


@pytest.mark.parametrize(
    ("there", "fast"),
    [
        ({"avx2": True}, False),
        ({"avx512_f": True, "avx512_bf16": False}, False),
        ({"avx512_bf16": True}, True),
        ({"amx_bf16": True}, True),
        ({"neon": True, "bf16": False}, False),
        ({"neon": True, "bf16": True}, True),
    ],
)
def test_what_quantised_matrices_become_depends_on_the_processor(there, fast, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: there)
    assert reading.multiplies_bf16() == fast
    assert reading.dequantised_dtype(torch.device("cpu")) == (torch.bfloat16 if fast else torch.float32)
    assert reading.dequantised_dtype(torch.device("cuda")) == torch.bfloat16


def test_a_processor_without_bf16_uses_float32_and_records_of_its_own(copies, tmp_path, monkeypatch):
    """Both kinds of machine share the file, the cache folder and the store."""
    gguf_files.write(build(), tmp_path / "m.gguf", Kind.Q8_0)
    graph = ContextGraph([list(range(20)), list(range(30, 50))], query=[7, 8])

    def answered(capabilities: dict[str, bool]) -> tuple[torch.dtype, dict[str, int], list[int]]:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
        with Engine.load(tmp_path / "m.gguf", store=tmp_path / "kv") as engine:
            result = engine.generate(graph, "block", max_tokens=4)
            return engine.model.dtype, result.usage.reused_tokens, result.token_ids

    old, new = {"avx2": True}, {"avx2": True, "avx512_bf16": True}
    first = [answered(old), answered(new)]
    assert [(dtype, reused) for dtype, reused, _ in first] == [(torch.float32, {}), (torch.bfloat16, {})]
    again = [answered(old), answered(new)]
    assert [(dtype, reused) for dtype, reused, _ in again] == [
        (torch.float32, {"disk": 40}),
        (torch.bfloat16, {"disk": 40}),
    ]
    assert [tokens for *_, tokens in again] == [tokens for *_, tokens in first]
    assert len(list(copies.iterdir())) == 2


@pytest.mark.parametrize("lacks", ["blk.1.", "blk.0.attn_k", "output_norm", "token_embd"])
def test_a_gguf_file_without_some_tensors_is_refused(lacks, tmp_path):
    """transformers would fill them with random numbers, other ones each time, under one fingerprint."""
    gguf_files.write(build(), tmp_path / "m.gguf", lacks=lacks)
    with pytest.raises(
        ModelError, match=r"can't load .*m\.gguf: it lacks weights, for example \S+\.weight; download"
    ) as no:
        models.load(tmp_path / "m.gguf")
    assert "\n" not in str(no.value)


def test_a_part_of_a_split_gguf_file_is_refused_with_what_to_do(tmp_path):
    name = "m-00001-of-00002.gguf"
    gguf_files.write(build(), tmp_path / name, lacks="blk.1.", parts=2)
    with pytest.raises(ModelError, match=rf"{name}: it is one of 2 parts .*`llama-gguf-split --merge") as refused:
        models.load(tmp_path / name)
    assert "\n" not in str(refused.value)


def test_a_tied_output_head_is_no_missing_tensor(tmp_path):
    hf = build(tie_word_embeddings=True)
    gguf_files.write(hf, tmp_path / "m.gguf")
    found = models.load(tmp_path / "m.gguf").hf
    assert found.lm_head.weight is found.get_input_embeddings().weight


def test_a_copy_from_before_tensors_were_checked_is_not_used(copies, tmp_path):
    """Older versions of the same name filled missing tensors with random numbers and kept them."""
    file, dequantised = tmp_path / "m.gguf", reading.dequantised_dtype(torch.device("cpu"))
    gguf_files.write(build(), tmp_path / "whole.gguf")
    gguf_files.write(build(), file, lacks="blk.1.")
    facts = [file_hash(file), None, "auto", str(dequantised), *map(converted._version, converted.MADE_BY)]
    old = converted.Copy(copies / hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32])
    whole = models.load(tmp_path / "whole.gguf")
    old.write(whole.hf, whole.tokenizer)
    assert old.read() is not None
    with pytest.raises(ModelError, match="it lacks weights"):
        models.load(file)


@pytest.fixture
def copies(tmp_path, monkeypatch) -> Path:
    """Where copies of converted models are, empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "kvgraph" / "gguf"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_copy_is_the_model_it_was_converted_from(family, copies, tmp_path, monkeypatch):
    name, changes = FAMILIES[family]
    gguf_files.write(build(name, **changes), tmp_path / "m.gguf", Kind.Q4_1)
    first = models.load(tmp_path / "m.gguf")
    assert len(list(copies.iterdir())) == 1
    monkeypatch.setattr(reading, "load_weights", None)  # from here on nothing is converted
    again = models.load(tmp_path / "m.gguf")
    assert torch.equal(logits(again), logits(first)) and again.dtype == first.dtype
    assert again.fingerprint == first.fingerprint and again.eos_ids == first.eos_ids
    assert again.tokenizer.chat_template == first.tokenizer.chat_template
    for text in ("hello", "<s> hell\n\n é", ""):
        ids = first.tokenizer.encode(text)
        assert again.tokenizer.encode(text) == ids and again.tokenizer.decode(ids) == first.tokenizer.decode(ids)
    with pytest.raises(ModelError, match="can't load"):  # other numbers are another copy
        models.load(tmp_path / "m.gguf", dtype="float32")


def test_a_damaged_copy_is_made_anew(copies, tmp_path):
    gguf_files.write(build(), tmp_path / "m.gguf")
    wanted = logits(models.load(tmp_path / "m.gguf"))
    (copy,) = copies.iterdir()
    weights = (copy / "model.safetensors").read_bytes()
    for damaged in (weights[:-8], weights[:-8] + bytes(8), b""):
        (copy / "model.safetensors").write_bytes(damaged)
        assert torch.equal(logits(models.load(tmp_path / "m.gguf")), wanted)
        assert (copy / "model.safetensors").read_bytes() == weights
    (copy / "config.json").write_text((copy / "config.json").read_text().replace("96", "95"))
    assert torch.equal(logits(models.load(tmp_path / "m.gguf")), wanted)


def test_few_copies_are_kept_and_none_of_large_models(copies, tmp_path, monkeypatch):
    for i in range(converted.COPIES + 2):
        gguf_files.write(build(rms_norm_eps=1e-6 * (i + 1)), tmp_path / f"{i}.gguf")
        models.load(tmp_path / f"{i}.gguf")
    assert len(list(copies.iterdir())) == converted.COPIES
    shutil.rmtree(copies)
    monkeypatch.setattr(converted, "LARGEST", 1000)
    models.load(tmp_path / "0.gguf")
    assert not copies.exists()
    monkeypatch.setattr(converted, "LARGEST", 1 << 30)
    copies.parent.mkdir(exist_ok=True)
    copies.write_text("a file where the folder should be")
    models.load(tmp_path / "0.gguf")


def test_an_engine_runs_a_gguf_file(tmp_path):
    gguf_files.write(build(), tmp_path / "m.gguf", Kind.Q8_0)
    with Engine.load(tmp_path / "m.gguf", dtype="float32") as engine:  # the gate passes
        found = engine.generate(ContextGraph(["hello ", "there "], "hell"), "block", max_tokens=4)
    assert 1 <= len(found.token_ids) <= 4


def test_what_can_not_be_read_is_said_in_one_line(copies, tmp_path, monkeypatch):
    gguf_files.write(build(), tmp_path / "strange.gguf", architecture="strange")
    with pytest.raises(ModelError, match="can't read the config of .*strange.gguf: .*strange.* not supported"):
        models.load(tmp_path / "strange.gguf")
    good = tmp_path / "good.gguf"
    gguf_files.write(build(), good, Kind.Q8_0)
    (tmp_path / "cut.gguf").write_bytes(good.read_bytes()[:2000])
    with pytest.raises(ModelError, match="can't read the config of .*cut.gguf: "):
        models.load(tmp_path / "cut.gguf")
    (tmp_path / "text.gguf").write_text("no model")
    with pytest.raises(ModelError, match="text.gguf is no GGUF file"):
        models.load(tmp_path / "text.gguf")
    monkeypatch.setattr(gguf.quants, "_type_traits", {}, raising=True)
    with pytest.raises(ModelError, match="can't load .*good.gguf: .*Q8_0"):
        models.load(good)
    monkeypatch.setattr(reading, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"install gguf and accelerate: pip install 'kvgraph\[gguf\]'"):
        models.load(good)


# -- adapters --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    gguf_files.write(build(tie_word_embeddings=True), folder / "m.gguf")
    found = models.load(folder / "m.gguf")
    models.save(found.hf, folder / "model", found.tokenizer)
    return folder / "model"


def adapter(base: Path, folder: Path, card: str = "", seed: int = 0, **changes) -> Path:
    torch.manual_seed(seed)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "init_lora_weights": False}
    module = get_peft_model(models.load(base).hf, LoraConfig(**settings | changes))
    module.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").write_text(card)
    return folder


def test_a_merged_adapter_is_pefts_own_forward(base, tmp_path):
    card = '---\nkvgraph: {"tuned_for": ["block"]}\n---\n'
    folder = adapter(base, tmp_path / "a", card, trainable_token_indices=[3, 4])
    plain, found = models.load(base), models.load(base, adapter=folder)
    assert found.tuned_for == ("block",) and plain.tuned_for == ()
    with torch.no_grad():
        expected = PeftModel.from_pretrained(models.load(base).hf, str(folder)).eval()(TOKENS).logits
    torch.testing.assert_close(logits(found), expected, atol=1e-4, rtol=1e-4)
    assert (logits(plain) - expected).abs().max() > 0.1
    models.save(found.hf, tmp_path / "merged", found.tokenizer)
    torch.testing.assert_close(logits(models.load(tmp_path / "merged")), expected, atol=1e-4, rtol=1e-4)


def test_a_base_and_its_adapters_never_share_a_record(base, tmp_path):
    folder = adapter(base, tmp_path / "a")
    other = adapter(base, tmp_path / "b", seed=1)
    same = Path(shutil.copytree(folder, tmp_path / "same"))
    config = json.loads((folder / "adapter_config.json").read_text())
    (same / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "elsewhere"}))
    scaled = Path(shutil.copytree(folder, tmp_path / "scaled"))
    (scaled / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 16}))
    prints = [models.load(base, adapter=a).fingerprint for a in (None, folder, other, scaled, same)]
    assert len(set(prints)) == 4 and prints[1] == prints[4]
    graph, used = ContextGraph(["hello hello ", "hell "], "he"), []
    for given in (None, folder, None, folder):
        with Engine.load(base, adapter=given, store=tmp_path / "store") as engine:
            used.append(engine.generate(graph, "block", max_tokens=1).usage.reused_tokens.get("disk", 0))
    assert used[:2] == [0, 0] and used[2] == used[3] > 0


def test_a_copy_holds_the_adapter_too(copies, base, tmp_path, monkeypatch):
    file, folder = base.parent / "m.gguf", adapter(base, tmp_path / "adapter")
    plain, first = models.load(file), models.load(file, adapter=folder)
    assert len(list(copies.iterdir())) == 2
    monkeypatch.setattr(reading, "load_weights", None)
    again = models.load(file, adapter=folder)
    assert torch.equal(logits(again), logits(first)) and not torch.equal(logits(first), logits(plain))
    assert again.fingerprint == first.fingerprint and torch.equal(logits(models.load(file)), logits(plain))


def test_a_folder_that_is_only_an_adapter_names_its_base(base, tmp_path):
    folder = adapter(base, tmp_path / "a")
    found = models.load(folder)
    assert found.fingerprint == models.load(base, adapter=folder).fingerprint and found.tokenizer is not None
    assert models.load_tokenizer(folder).encode("hell") == found.tokenizer.encode("hell")
    with pytest.raises(ModelError, match="is an adapter itself"):
        models.load(folder, adapter=folder)
    config = folder / "adapter_config.json"
    told = json.loads(config.read_text())
    config.write_text(json.dumps(told | {"base_model_name_or_path": None}))
    with pytest.raises(ModelError, match="doesn't name its base; give the model, and this with --adapter"):
        models.load(folder)
    config.write_text(json.dumps(told | {"base_model_name_or_path": "./gone"}))
    with pytest.raises(ModelError, match="there is no folder ./gone"):
        models.load(folder)


def test_adapters_that_do_not_fit_are_refused(base, tmp_path):
    folder = adapter(base, tmp_path / "a")
    wide = build(hidden_size=32)
    models.save(wide, tmp_path / "wide")
    with pytest.raises(ModelError, match="the adapter .* doesn't fit the model: "):
        models.load(tmp_path / "wide", adapter=folder)
    with pytest.raises(ModelError, match="there is no adapter folder ./nothing"):
        models.load(base, adapter="./nothing")
    with pytest.raises(ModelError, match=r"it has no adapter_config.json"):
        models.load(base, adapter=base)
    told = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(told | {"peft_type": "IA3"}))
    with pytest.raises(ModelError, match="of the kind IA3; there are LORA, TRAINABLE_TOKENS"):
        models.load(base, adapter=folder)


def rewritten(folder: Path, change) -> Path:
    """An adapter with another dictionary of tensors in place of its own."""
    file = folder / WEIGHTS
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
    return folder


def test_an_adapter_of_fewer_layers_is_not_merged_into_some_of_them(base, tmp_path):
    folder = adapter(base, tmp_path / "a", target_modules=["q_proj", "down_proj"])
    models.save(build(num_hidden_layers=families.LAYERS + 2), tmp_path / "deep")
    line = rf"doesn't fit the model: .* lacks 8 weights, for example .*layers\.{families.LAYERS}\."
    with pytest.raises(ModelError, match=line):
        models.load(tmp_path / "deep", adapter=folder)


WRAPPED = "base_model.model.model.language_model."


@pytest.mark.parametrize(
    ("rows", "change", "line"),
    [
        (
            None,
            lambda t: {k.replace("base_model.model.model.", WRAPPED): v for k, v in t.items()},
            r"lacks \d+ weights",
        ),
        ([3], lambda t: {k: v for k, v in t.items() if "1.mlp.up_proj.lora_A" not in k}, r"lacks \S+lora_A\S+weight"),
        (
            [3],
            lambda t: {k: v for k, v in t.items() if "trainable_tokens" not in k},
            r"lacks \S+trainable_tokens_delta",
        ),
        (
            [3],
            lambda t: t | {"base_model.model.model.layers.7.x.lora_A.weight": torch.ones(4, 4)},
            "no place for .*7.x",
        ),
    ],
    ids=["prefix", "one", "rows", "more"],
)
def test_an_adapter_that_does_not_cover_what_it_names_is_refused(rows, change, line, base, tmp_path):
    folder = rewritten(adapter(base, tmp_path / "a", trainable_token_indices=rows), change)
    with pytest.raises(ModelError, match=f"the adapter .* doesn't fit the model: .*{line}") as refused:
        models.load(base, adapter=folder)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]},
        {"target_modules": ["q_proj", "another_models_proj"]},
        {"target_modules": r".*\.1\.mlp\.up_proj"},
        {"rank_pattern": {"v_proj": 2}, "use_rslora": True},
        {"use_dora": True},
        {"modules_to_save": ["norm"]},
    ],
    ids=lambda changes: next(reversed(changes)),
)
def test_an_adapter_of_what_it_names_is_merged(changes, base, tmp_path):
    folder = adapter(base, tmp_path / "a", **changes)
    with torch.no_grad():
        expected = PeftModel.from_pretrained(models.load(base).hf, str(folder)).eval()(TOKENS).logits
    found = logits(models.load(base, adapter=folder))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert (found - logits(models.load(base))).abs().max() > 0.01 or "modules_to_save" in changes  # a copy of its norm


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.filterwarnings("ignore:Input and output embeddings are no longer tied")
@pytest.mark.parametrize("changes", [{"trainable_token_indices": [3]}, {"modules_to_save": ["embed_tokens"]}])
def test_an_adapter_with_its_embeddings_written_twice_is_merged(changes, base, tmp_path):
    """As peft does when a vocabulary has grown."""
    folder = adapter(base, tmp_path / "a", **changes)
    wanted = logits(models.load(base, adapter=folder))
    module = PeftModel.from_pretrained(models.load(base).hf, str(folder))
    module.save_pretrained(tmp_path / "twice", save_embedding_layers=True)
    assert len(load_file(tmp_path / "twice" / WEIGHTS)) > len(load_file(folder / WEIGHTS))
    assert torch.equal(logits(models.load(base, adapter=tmp_path / "twice")), wanted)


def test_an_adapter_of_link_rows_alone_is_merged_too(base, tmp_path):
    module = get_peft_model(models.load(base).hf, TrainableTokensConfig(token_indices=[5, 6]))
    with torch.no_grad():
        for name, p in module.named_parameters():
            if "trainable_tokens" in name:
                p += 1.0
    module.save_pretrained(tmp_path / "rows", save_embedding_layers=False)
    found = models.load(base, adapter=tmp_path / "rows").hf.get_input_embeddings().weight
    plain = models.load(base).hf.get_input_embeddings().weight
    changed = (found != plain).any(1).nonzero().flatten().tolist()
    assert changed == [5, 6]
