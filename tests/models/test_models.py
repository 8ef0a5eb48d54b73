"""Every family: dense reference against the untouched model, our forward against it, facts, refusals, fingerprints."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tokenizers
import torch
import transformers
import xxhash
from safetensors.torch import load_file, save_file

import families
from kvgraph import ContextGraph, Engine, ModelError, models
from kvgraph.models import Layer, Model, fingerprint, loading
from kvgraph.models.fingerprint import file_hash
from kvgraph.models.loading import weight_files

T = 29  # more than three windows
EVERY = sorted(families.FAMILIES)
CAUSAL = torch.ones(T, T, dtype=torch.bool).tril()


def tokens(n: int = T, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 128, (n,), generator=torch.Generator().manual_seed(seed))


def worst(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape and a.dtype == b.dtype == torch.float32
    return float((a - b).abs().max())


def naive(model: Model, positions: torch.Tensor, visible: torch.Tensor) -> models.Attend:
    """Plain softmax attention from the layer facts: what an engine must amount to."""

    def attend(layer, q, k, v, scale, softcap, sinks):
        facts = model.layers[layer]
        assert k.shape == (facts.kv_heads, len(positions), facts.key_dim) and v.shape[-1] == facts.value_dim
        k, v = (x.repeat_interleave(q.shape[0] // x.shape[0], 0) for x in (k, v))
        scores = q @ k.transpose(1, 2) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        seen = visible
        if facts.window is not None:
            seen = seen & (positions[:, None] - positions[None] < facts.window)
        weights = scores.masked_fill(~seen, -torch.inf).exp()
        total = weights.sum(-1, keepdim=True)
        if sinks is not None:
            total = total + sinks.exp()[:, None, None]
        return weights / total @ v

    return attend


@pytest.mark.parametrize("family", EVERY)
def test_dense_is_the_untouched_model(family):
    untouched = families.FAMILIES[family]()
    untouched.set_attn_implementation("eager")  # sdpa ignores gemma2's softcap in some versions of transformers
    model = models.wrap(copy.deepcopy(untouched))
    with torch.no_grad():
        plain = untouched(input_ids=tokens()[None], use_cache=False).logits[0]
    assert plain.std() > 0.1
    assert worst(model.dense(tokens(), torch.arange(T), CAUSAL), plain) <= 1e-4
    with torch.no_grad():  # and the wrapped model itself still runs as it did
        assert worst(model.hf(input_ids=tokens()[None], use_cache=False).logits[0], plain) <= 1e-4
    assert not torch.equal(model.dense(tokens(), torch.arange(T), torch.eye(T, dtype=torch.bool)), plain)


@pytest.mark.parametrize("family", EVERY)
def test_forward_with_naive_attention_is_dense(family):
    model = models.wrap(families.FAMILIES[family]())
    # Two blocks that start at the same position, and a tail with gaps that sees both by position.
    positions = torch.cat([torch.arange(10), torch.arange(10), torch.tensor([10, 11, 12, 17, 18, 19, 20, 21, 22])])
    visible = positions[:, None] > positions[None]
    visible[10:20, :10] = False
    visible[:10, 10:20] = False
    visible |= torch.eye(T, dtype=torch.bool)
    expected = model.dense(tokens(), positions, visible)
    everything = model.forward(tokens(), positions, naive(model, positions, visible), torch.arange(T))
    assert worst(everything, expected) <= 1e-4
    want = torch.tensor([28, 3])
    assert worst(model.forward(tokens(), positions, naive(model, positions, visible), want), expected[want]) <= 1e-4
    none = model.forward(tokens(), positions, naive(model, positions, visible), torch.tensor([], dtype=torch.int64))
    assert none.shape == (0, 128)
    # The mask matters: the same tokens, one causal chain, give something else.
    assert (model.dense(tokens(), torch.arange(T), CAUSAL)[-1] - expected[-1]).abs().max() > 1e-2


@pytest.mark.parametrize("family", EVERY)
def test_logits_depend_on_distances_alone(family):
    model = models.wrap(families.FAMILIES[family]())
    here = model.dense(tokens(), torch.arange(T), CAUSAL)
    for shift in (-1000, 777, 100_000):
        assert worst(model.dense(tokens(), torch.arange(T) + shift, CAUSAL), here) <= 1e-4
    stretched = model.dense(tokens(), torch.arange(T) * 2, CAUSAL)
    assert (stretched - here).abs().max() > 1e-2


@pytest.mark.parametrize("family", EVERY)
def test_stored_keys_may_be_moved(family):
    """Delta rotation: keys computed at one place, rotated by `Rotary`, are the keys computed at another."""
    model = models.wrap(families.FAMILIES[family]())
    shift = 4321

    def keys_at(positions):
        keys = []

        def attend(layer, q, k, v, *rest):
            keys.append(k)
            return naive(model, positions, CAUSAL)(layer, q, k, v, *rest)

        model.forward(tokens(), positions, attend, torch.tensor([0]))
        return keys

    for layer, first, second in zip(
        model.layers, keys_at(torch.arange(T)), keys_at(torch.arange(T) + shift), strict=True
    ):
        if layer.rotary is not None:
            rotary = model.rotaries[layer.rotary]
            first = rotary.rotate(first, *rotary.table(torch.full((T,), shift)))
        assert worst(first, second) <= 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", EVERY)
def test_16_bit_models_have_the_same_layers(family, dtype):
    exact = models.wrap(families.FAMILIES[family]())
    short = models.wrap(families.FAMILIES[family]().to(dtype))
    assert short.layers == exact.layers and short.dtype == dtype
    assert short.kv_bytes_per_token * 2 == exact.kv_bytes_per_token == families.LAYERS * 2 * (16 + 16) * 4
    for a, b in zip(short.rotaries, exact.rotaries, strict=True):
        assert torch.equal(a.inv_freq, b.inv_freq) and a.interleaved == b.interleaved
    assert short.dense(tokens(), torch.arange(T), CAUSAL).isfinite().all()


W = families.WINDOW


@pytest.mark.parametrize(
    ("family", "rotary", "window"),
    [
        ("llama", (0, 0, 0), (None, None, None)),
        ("mistral", (0, 0, 0), (W, W, W)),
        ("starcoder2", (0, 0, 0), (W, W, W)),
        ("gemma2", (0, 0, 0), (W, None, W)),
        ("gemma3_text", (0, 1, 0), (None, W, None)),
        ("olmo3", (0, 1, 0), (W, None, W)),
        ("gpt_oss", (0, 0, 0), (W, None, W)),
        ("smollm3", (0, None, 0), (None, None, None)),
        ("cohere2", (0, None, 0), (W, None, W)),
    ],
)
def test_layer_facts(family, rotary, window):
    model = models.wrap(families.FAMILIES[family]())
    facts = list(zip(rotary, window, strict=True))[: families.LAYERS]
    assert model.layers == tuple(Layer(r, w, 2, 16, 16) for r, w in facts)
    assert len(model.rotaries) == len({r for r, _ in facts if r is not None})


@pytest.mark.parametrize(
    ("family", "interleaved", "dims"),
    [("llama", False, 16), ("cohere", True, 16), ("cohere2", True, 16), ("glm4", True, 8), ("phi3", False, 8)],
)
def test_rotary_layout(family, interleaved, dims):
    (rotary,) = models.wrap(families.FAMILIES[family]()).rotaries
    assert (rotary.interleaved, rotary.dims) == (interleaved, dims)


def worded(*words: str, **special: str) -> transformers.PreTrainedTokenizerFast:
    """A tokenizer of whole words; special: its special tokens."""
    vocabulary = {word: i for i, word in enumerate(words)}
    split = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, "?"))
    split.add_special_tokens([word for word in words if word.startswith("<")])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=split, **special)


def test_an_answer_ends_at_whatever_anything_names_as_the_end():
    """Generation config, config, tokenizer and chat template may all name another one."""
    tokenizer = worded("?", "a", "<text>", "<end>", "<turn>", "<pad>", eos_token="<end>", pad_token="<pad>")
    hf = families.build("Llama", num_hidden_layers=1, eos_token_id=2)
    hf.generation_config.eos_token_id = [9]
    model = models.wrap(hf, tokenizer)
    assert set(model.eos_ids) == {9, 2, 3}
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}<turn>\n{% endfor %}<pad>"
    assert set(model.eos_ids) == {9, 2, 3, 4}  # also a template that is given later
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    assert set(model.eos_ids) == {9, 2, 3}  # a turn that ends without a special token
    hf.generation_config.eos_token_id = hf.config.eos_token_id = None
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    assert model.eos_ids == (3,)


@pytest.mark.parametrize("end", [9, 2, 3, 4])
def test_every_end_token_ends_an_answer(end):
    tokenizer = worded("?", "a", "<text>", "<end>", "<turn>", eos_token="<end>")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}<turn>{% endfor %}"
    hf = families.build("Llama", num_hidden_layers=1, eos_token_id=2)
    hf.generation_config.eos_token_id = 9
    engine = Engine(models.wrap(hf, tokenizer), kv_budget=1 << 24)
    graph = ContextGraph((), (1, 5, 7))
    always = {"max_tokens": 6, "logit_bias": {end: 100.0}}
    result = engine.generate(graph, "full", **always)
    assert (result.finish_reason, result.token_ids, result.text) == ("stop", [end], "")
    assert engine.generate(graph, "full", min_tokens=4, **always).token_ids.index(end) == 4
    assert engine.generate(graph, "full", ignore_eos=True, **always).finish_reason == "length"


def test_model_facts():
    hf = families.build("Llama", num_hidden_layers=1, kvgraph={"tuned_for": ["block", "graph-kv"]}, eos_token_id=[2, 5])
    model = models.wrap(hf, name="tiny")
    assert (model.name, model.tokenizer, model.limit, model.vocab_size) == ("tiny", None, families.LIMIT, 128)
    assert (model.device.type, model.dtype, model.eos_ids) == ("cpu", torch.float32, (2, 5))
    assert model.tuned_for == ("block", "graph-kv")
    assert models.wrap(families.FAMILIES["llama"]()).tuned_for == ()
    with pytest.raises(ModelError, match="tuned_for"):
        models.wrap(families.build("Llama", kvgraph={"tuned_for": "block"}))


def test_yarn_stretches_the_limit():
    assert models.wrap(families.build("Qwen2", max_position_embeddings=64, rope_parameters={
        **families.YARN, "original_max_position_embeddings": 64})).limit == 256  # fmt: skip


def test_a_failing_attend_leaves_the_model_as_it_was():
    model = models.wrap(families.FAMILIES["llama"]())
    before = model.hf.config._attn_implementation

    def fail(*args):
        assert model.hf.config._attn_implementation != before
        raise MemoryError("no memory")

    with pytest.raises(MemoryError):
        model.forward(tokens(), torch.arange(T), fail, torch.tensor([0]))
    assert model.hf.config._attn_implementation == before


def test_wrapping_twice_changes_nothing():
    hf = families.FAMILIES["gemma3_text"]()
    first, second = models.wrap(hf), models.wrap(hf)
    assert first.fingerprint == second.fingerprint and first.layers == second.layers
    assert worst(*(m.dense(tokens(), torch.arange(T), CAUSAL) for m in (first, second))) == 0


# -- refusals --------------------------------------------------------------------------------------------------------

LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 48,
    "long_factor": [2.0] * 48,
    "original_max_position_embeddings": 64,
    "factor": 2.0,
}
REFUSED = [
    ("Llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "dynamic NTK"),
    ("Phi3", {"rope_parameters": LONGROPE}, "longrope"),
    ("Ministral3", {}, "scales queries by position"),
    ("Qwen2", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}, "mrope"),
    ("Qwen2VL", {"text_config": {"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}}}, "mrope"),
    ("Gemma3", {}, "text-only"),
    ("DeepseekV3", {}, "latent attention"),
    ("Mamba", {}, "recurrent"),
    ("Qwen3Next", {}, "recurrent"),
    ("Qwen3_5Text", {}, "linear_attention"),
    ("GPT2", {}, "learned absolute positions"),
    ("OPT", {}, "learned absolute positions"),
    ("Bloom", {}, "ALiBi"),
    ("Falcon", {"alibi": True}, "ALiBi"),
    ("Llama4Text", {}, "chunked attention|by position"),
    ("Gemma3Text", {"use_bidirectional_attention": True}, "bidirectional"),
    ("T5", {}, "encoder-decoder"),
]


@pytest.mark.parametrize(("family", "changes", "reason"), REFUSED)
def test_refused_with_the_reason_whatever_is_allowed(family, changes, reason, tmp_path):
    config = getattr(transformers, f"{family}Config")(**changes)
    config.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=reason) as error:
        models.load(tmp_path, allow_untested=True)
    assert "\n" not in str(error.value)


def tiny(name: str, **changes) -> transformers.PreTrainedModel:
    return families.build(name, num_hidden_layers=2, **changes)


def test_untested_types_need_the_flag_and_the_probe():
    hf = tiny("Mixtral", num_local_experts=2)
    with pytest.raises(ModelError, match=r"mixtral isn't among the tested ones .*--allow-untested"):
        models.wrap(hf)
    with torch.no_grad():
        plain = hf(input_ids=tokens()[None], use_cache=False).logits[0]
    model = models.wrap(hf, allow_untested=True)
    assert worst(model.dense(tokens(), torch.arange(T), CAUSAL), plain) <= 1e-4


@pytest.mark.parametrize(
    ("family", "reason"),
    [("StableLm", "doesn.t pass keyword arguments"), ("Doge", "its own attention mask"), ("GPTJ", "size of tensor")],
)
def test_untested_models_that_run_attention_their_own_way_are_refused(family, reason):
    with pytest.raises(ModelError, match=f"can't be run: .*{reason}"):
        models.wrap(tiny(family), allow_untested=True)


def test_untested_models_must_give_back_their_own_logits(monkeypatch):
    hf = tiny("Mixtral", num_local_experts=2, sliding_window=W)
    observed = loading.probe
    blind = lambda *a: (r := observed(*a))[:1] + (tuple(Layer(x.rotary, None, 2, 16, 16) for x in r[1]),)  # noqa: E731
    monkeypatch.setattr(loading, "probe", blind)
    with pytest.raises(ModelError, match="differs from its own plain forward"):
        models.wrap(hf, allow_untested=True)


def test_the_probe_refuses_positions_it_does_not_understand():
    hf = tiny("Llama")
    with torch.no_grad():
        hf.model.rotary_emb.inv_freq.mul_(2)
    with pytest.raises(ModelError, match="differs from the model.s config"):
        models.wrap(hf)

    # A projection of the second layer whose output grows with the position, as ministral3's queries do.
    for attribute, reason in (("q_proj", "queries"), ("k_proj", "keys"), ("v_proj", "values")):
        attention, now = (hf := tiny("Llama")).model.layers[1].self_attn, {}
        attention.register_forward_pre_hook(lambda _, args, kwargs, now=now: now.update(kwargs), with_kwargs=True)
        getattr(attention, attribute).register_forward_hook(
            lambda _, args, out, now=now: out * (1 + now["position_ids"][..., None] / 100)
        )
        with pytest.raises(ModelError, match=f"layer 1's {reason}"):
            models.wrap(hf)


# -- loading and fingerprints ----------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder / "kvgraph" / "weights.json"


@pytest.fixture
def saved(tmp_path) -> Path:
    folder = tmp_path / "model"
    families.FAMILIES["llama"]().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", EVERY)
def test_every_family_loads_from_a_folder(family, tmp_path):
    hf = families.FAMILIES[family]()
    hf.save_pretrained(tmp_path)
    loaded = models.load(tmp_path, dtype="float32")
    assert loaded.tokenizer is None and loaded.name == str(tmp_path)
    expected = models.wrap(hf)
    assert loaded.layers == expected.layers
    assert worst(*(m.dense(tokens(), torch.arange(T), CAUSAL) for m in (loaded, expected))) <= 1e-5


def test_a_copied_folder_is_the_same_model(saved, tmp_path):
    first = models.load(saved)
    assert len(first.fingerprint) == 64 and first.dtype == torch.float32
    shutil.copytree(saved, tmp_path / "elsewhere")
    assert models.load(tmp_path / "elsewhere").fingerprint == first.fingerprint


def test_a_model_card_declares_tuning_too(saved):
    card = saved / "README.md"
    card.write_text("---\nlicense: apache-2.0\nkvgraph:\n  tuned_for: [kvlink]\n---\n# A model\n")
    assert models.load(saved).tuned_for == ("kvlink",)
    card.write_text("# A card without front matter\n")
    assert models.load(saved).tuned_for == ()
    card.write_text("---\nkvgraph: block\n---\n")
    with pytest.warns(UserWarning, match="model card"):
        assert models.load(saved).tuned_for == ()
    card.write_bytes(b"---\nkvgraph: {tuned_for: [block\n---\n\xff")
    with pytest.warns(UserWarning, match="can't be read"):
        assert models.load(saved).tuned_for == ()


@pytest.mark.parametrize("part", ["config", "model", "tokenizer"])
def test_code_that_a_folder_brings_is_never_run(part, saved, tmp_path, monkeypatch):
    """And nobody is asked whether it may be. A folder that brings some for a known type is loaded without it."""
    worded("?", "a").save_pretrained(saved)
    (saved / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Any: pass\n")
    brought = {"AutoConfig": "code.Any", "AutoModelForCausalLM": "code.Any", "AutoTokenizer": ["code.Any", "code.Any"]}
    rewrite_config(saved, auto_map=brought)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on the terminal"))
    assert models.load(saved).eos_ids == (2,) and models.load_tokenizer(saved) is not None
    refused = pytest.raises(ModelError, match=r"brings along \(auto_map\), and kvgraph never runs")
    if part == "tokenizer":
        config = json.loads((saved / "tokenizer_config.json").read_text())
        brings = {"tokenizer_class": "Odd", "auto_map": {"AutoTokenizer": ["code.Any", None]}}
        (saved / "tokenizer_config.json").write_text(json.dumps(config | brings))
        with refused:
            models.load_tokenizer(saved)
    elif part == "config":
        rewrite_config(saved, model_type="odd")
        assert models.tuned_for(saved) == ()
    else:  # transformers knows the config, but no causal LM for it
        rewrite_config(saved, model_type="vit")
    with refused if part != "model" else pytest.raises(ModelError):
        models.load(saved, allow_untested=True)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json", "model-00001-of-00002.safetensors"])
def test_a_folder_cloned_without_git_lfs_says_so(file, saved):
    worded("?", "a").save_pretrained(saved)
    (saved / file).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 12345\n")
    says = rf"only a Git LFS pointer in place of {file}; run `git lfs pull`"
    with pytest.raises(ModelError, match=says):
        models.load(saved)
    with pytest.raises(ModelError, match=says):
        models.load_tokenizer(saved)


def test_weights_of_other_shapes_are_named(saved):
    rewrite_config(saved, intermediate_size=24)
    with pytest.raises(ModelError, match="weights don't have the shapes given by its config.json"):
        models.load(saved)


def rewrite_config(folder: Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def test_what_a_fingerprint_depends_on(saved):
    def fingerprint(**options):
        return models.load(saved, **options).fingerprint

    seen = {fingerprint(), fingerprint(dtype=torch.bfloat16), fingerprint(dtype="float16")}
    assert len(seen) == 3
    first = fingerprint()
    rewrite_config(
        saved,
        dtype="float32",
        transformers_version="9",
        _name_or_path="x",
        eos_token_id=7,
        kvgraph={"tuned_for": ["block"]},
    )
    assert fingerprint() == first and models.load(saved).tuned_for == ("block",)
    for change in (
        {"rms_norm_eps": 1e-4},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        {"hidden_act": "gelu"},
    ):
        rewrite_config(saved, **change)
        assert fingerprint() not in seen
        seen.add(fingerprint())
    weights = load_file(saved / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"][0, 0] += 1e-3
    save_file(weights, saved / "model.safetensors", {"format": "pt"})
    assert fingerprint() not in seen


def test_a_fingerprint_changes_with_the_numerics_version(saved, monkeypatch):
    before = models.load(saved).fingerprint
    monkeypatch.setattr(fingerprint, "ATTENTION_NUMERICS", fingerprint.ATTENTION_NUMERICS + 1)
    assert models.load(saved).fingerprint != before


def test_a_wrapped_models_fingerprint_follows_its_weights():
    hf = families.FAMILIES["llama"]()
    first = models.wrap(hf).fingerprint
    assert models.wrap(families.FAMILIES["llama"]()).fingerprint == first
    with torch.no_grad():
        hf.model.layers[0].mlp.up_proj.weight[0, 0] += 1e-3
    assert models.wrap(hf).fingerprint != first
    assert models.wrap(families.FAMILIES["llama"]().to(torch.bfloat16)).fingerprint != first


def test_a_hub_name_in_another_process_is_the_same_model(saved, tmp_path):
    repository, commit = tmp_path / "hub" / "models--org--tiny", "0" * 40
    shutil.copytree(saved, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    code = "from kvgraph import models; m = models.load('org/tiny'); print(m.name, m.fingerprint)"
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    environment.pop("HF_HUB_CACHE", None)
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split()[-2:] == ["org/tiny", models.load(saved).fingerprint]


@pytest.fixture
def large(saved, monkeypatch) -> Path:
    """A file of weights of which only samples are read where its hash is remembered; its times are long past."""
    monkeypatch.setattr(fingerprint, "WHOLE", 0)
    monkeypatch.setattr(fingerprint, "EVERY", 4096)
    monkeypatch.setattr(fingerprint, "SAMPLE", 64)
    now = time.time_ns
    monkeypatch.setattr(time, "time_ns", lambda: now() + 10**10)
    return saved / "model.safetensors"


def unchanged(path: Path, monkeypatch) -> None:
    """From now on whatever is at this path has the same size, times and inode as now."""
    status, stat = path.stat(), Path.stat
    monkeypatch.setattr(Path, "stat", lambda p, **options: status if p == path else stat(p, **options))


def test_weight_hashes_are_remembered_until_the_file_changes(large, cache, monkeypatch):
    key, first = str(large.resolve()), file_hash(large)
    assert first == xxhash.xxh3_128_hexdigest(large.read_bytes())
    assert list(memory := json.loads(cache.read_text())) == [key]
    cache.write_text(json.dumps({key: [*memory[key][:-1], "remembered"]}))
    assert file_hash(large) == "remembered"
    for field in range(5):  # size, times, inode, samples
        cache.write_text(json.dumps({key: [*memory[key][:field], 0, *memory[key][field + 1 : -1], "remembered"]}))
        assert file_hash(large) == first
    cache.write_text("not json")
    assert file_hash(large) == first
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null/nowhere")
    assert file_hash(large) == first


def test_a_weight_file_that_is_a_moment_old_is_not_remembered(large, cache, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(fingerprint, "WHOLE", 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache.parents[1]))
    os.utime(large, ns=(10**18, 10**18))  # says that it is old, but the time of its last change can't lie
    file_hash(large)
    assert not cache.exists()


def test_other_weights_with_the_same_size_times_and_inode_are_found_out(large, cache, monkeypatch):
    """As on layers of images and mounted object stores. Any tensor of EVERY bytes or more that differs is noticed."""
    unchanged(large, monkeypatch)
    first, content = file_hash(large), bytearray(large.read_bytes())
    assert cache.exists()
    for at in (0, 4096, 5 * 4096 + 63, len(content) - 1):
        large.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        assert file_hash(large) != first
        large.write_bytes(content)
        assert file_hash(large) == first


def test_small_weight_files_are_read_whole_at_every_load(saved, cache, monkeypatch):
    file = saved / "model.safetensors"
    unchanged(file, monkeypatch)
    first, content = file_hash(file), bytearray(file.read_bytes())
    content[len(content) // 2 + 1] ^= 1
    file.write_bytes(content)
    assert file_hash(file) != first and not cache.exists()


@pytest.mark.parametrize("family", ["llama3", "gemma3_text", "granite", "qwen2"])
def test_a_stacked_model_runs_its_last_layers_twice(family, tmp_path):
    """What is added is a copy, of its own from then on; the model saves, loads and passes the checks as any other."""
    hf = families.FAMILIES[family]()
    before = {name: p.clone() for name, p in hf.state_dict().items()}
    last, deeper = families.LAYERS - 1, families.LAYERS + 2
    models.stack(hf, 2)
    assert len(hf.model.layers) == hf.config.num_hidden_layers == deeper
    after = hf.state_dict()
    assert all(torch.equal(after[name], p) for name, p in before.items())
    for name in before:
        if f".layers.{last}." in name:
            copy = name.replace(f".{last}.", f".{last + 2}.")
            assert torch.equal(after[copy], after[name])
            after[copy].add_(1)
            assert torch.equal(after[name], before[name])
    assert len(models.trainable(hf).layers) == deeper
    hf.set_attn_implementation("sdpa")
    models.save(hf, tmp_path / "deeper")
    windows = [layer.window for layer in models.load(tmp_path / "deeper").layers]
    assert len(windows) == deeper and windows[-2:] == windows[-4:-2]
    with pytest.raises(ModelError, match=f"has {deeper} layers, so 6 can't be copied"):
        models.stack(hf, 6)


def test_16_bit_folders_load_as_they_are_or_as_told(tmp_path):
    families.FAMILIES["gemma3_text"]().to(torch.bfloat16).save_pretrained(tmp_path)
    assert models.load(tmp_path).dtype == torch.bfloat16
    assert models.load(tmp_path, dtype="float32").dtype == torch.float32


def test_the_tokenizer_comes_with_the_folder_and_not_into_the_fingerprint(saved):
    first = models.load(saved)
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?").save_pretrained(saved)
    second = models.load(saved)
    assert second.tokenizer.encode("b a c", add_special_tokens=False) == [1, 0, 2]
    assert first.tokenizer is None and second.fingerprint == first.fingerprint


def test_sharded_weights_load_and_count(tmp_path):
    hf = families.FAMILIES["llama"]()
    hf.save_pretrained(tmp_path, max_shard_size="100KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 1 and weight_files(tmp_path, "x") == shards
    models.load(tmp_path)
    shards[-1].unlink()
    with pytest.raises(ModelError, match=f"lacks {shards[-1].name}"):
        models.load(tmp_path)


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def truncated(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 5000)


def incomplete(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.down_proj.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")


def bad_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def bad_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{")


def other_shape(folder: Path) -> None:
    rewrite_config(folder, intermediate_size=50)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (pickled, "only pickled weights.*safetensors"),
        (without_weights, "no model.safetensors"),
        (truncated, "can't load"),
        (incomplete, r"lacks weights, for example model\.layers\.1\.mlp\.down_proj\.weight"),
        (other_shape, "can't load"),
        (adapter, "adapter.*merge"),
        (bad_config, "can't read the config"),
        (no_config, "no config.json"),
        (bad_tokenizer, "can't load the tokenizer"),
    ],
)
def test_broken_folders_are_one_clear_line(damage, message, saved):
    damage(saved)
    with pytest.raises(ModelError, match=message) as error:
        models.load(saved)
    assert "\n" not in str(error.value) and "Traceback" not in str(error.value)


def test_wrong_arguments_are_one_clear_line(saved, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for arguments, message in (
        ({"path_or_name": "nobody/no-such-model"}, "nobody/no-such-model"),
        ({"path_or_name": "./missing"}, "there is no folder ./missing"),
        ({"path_or_name": saved, "dtype": "int8"}, "dtype int8"),
        ({"path_or_name": saved, "dtype": torch.float64}, "float64"),
        ({"path_or_name": saved, "device": "abacus"}, "unknown device abacus"),
    ):
        with pytest.raises(ModelError, match=message) as error:
            models.load(**arguments)
        assert "\n" not in str(error.value)
