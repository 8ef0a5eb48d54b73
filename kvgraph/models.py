"""The transformers adapter: load a causal LM, run it with attention that is ours, and say what its layers do.

The only file that touches transformers' internals. Attention is reached through `AttentionInterface`: the model runs as
it is, on one packed sequence without a cache, and hands every layer's rotated queries, keys and values to a function.
What a layer does (rotation, sliding window, head sizes) is observed in a probe, not read from the model's name.

Shapes: T packed tokens, H query heads, G key/value heads, D key head size, Dv value head size, V vocabulary.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
import xxhash
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface
from transformers.utils import logging as transformers_logging

from kvgraph import memo
from kvgraph.errors import ModelError
from kvgraph.rope import Rotary

# Raise it whenever attention or rotation changes the numbers it gives: old records then become misses.
ATTENTION_NUMERICS = 1

# Model types whose composed logits are tested against a plain forward; anything else needs allow_untested.
TESTED = frozenset(
    "llama mistral qwen2 qwen3 qwen3_moe gemma gemma2 gemma3_text phi3 olmo2 olmo3 smollm3 granite cohere cohere2 glm4 "
    "gpt_oss starcoder2".split()
)

# (layer, q [H, T, D], k [G, T, D], v [G, T, Dv], scale, softcap or None, sinks [H] or None) -> [H, T, Dv]
Attend = Callable[[int, Tensor, Tensor, Tensor, float, float | None, Tensor | None], Tensor]

_IMPLEMENTATION = "kvgraph"
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# Config fields that can't change KV: names, library versions, storage, special tokens, training and output settings.
_NOT_KV = frozenset(
    "_name_or_path transformers_version architectures auto_map dtype torch_dtype kvgraph id2label label2id problem_type"
    " bos_token_id eos_token_id pad_token_id sep_token_id return_dict output_hidden_states output_attentions use_cache "
    "output_router_logits router_aux_loss_coef initializer_range attention_dropout hidden_dropout embd_pdrop "
    "resid_pdrop residual_dropout embedding_dropout classifier_dropout chunk_size_feed_forward tie_word_embeddings "
    "final_logit_softcapping logit_scale logits_scaling".split()
)


@dataclass(frozen=True)
class Layer:
    """What attention needs to know of one layer.

    rotary: index into Model.rotaries, None: the layer doesn't rotate. window: a key is visible only if position of the
    query - position of the key < window, None: no such limit. kv_heads, key_dim, value_dim: G, D and Dv.
    """

    rotary: int | None
    window: int | None
    kv_heads: int
    key_dim: int
    value_dim: int


class Model:
    """A causal LM as the engine sees it; made by `load` or `wrap`.

    hf: the transformers model, in eval mode; between calls it behaves as before, but with float64 rotary angles.
    tokenizer: or None. name: for people. fingerprint: 64 hex digits, equal only for models that compute the same KV.
    limit: positions must stay below it. tuned_for: methods that the model's config, or the front matter of its card
    (README.md), declares tuning for, under the key "kvgraph": {"tuned_for": [...]}. One call runs at a time.
    """

    def __init__(
        self,
        hf: PreTrainedModel,
        tokenizer: Any,
        name: str,
        fingerprint: str,
        rotaries: tuple[Rotary, ...],
        layers: tuple[Layer, ...],
    ):
        self.hf, self.tokenizer = hf, tokenizer
        self.name, self.fingerprint = name, fingerprint
        self.rotaries, self.layers = rotaries, layers
        self.dtype: torch.dtype = hf.dtype
        self.device: torch.device = hf.device
        self.limit = _limit(hf.config)
        self.vocab_size = _vocabulary(hf)
        self.eos_ids = _eos_ids(hf)
        self.tuned_for = _declared(hf.config.to_dict(), f"{name}'s config")
        numbers = sum(layer.kv_heads * (layer.key_dim + layer.value_dim) for layer in layers)
        self.kv_bytes_per_token = numbers * self.dtype.itemsize

    def forward(self, tokens: Tensor, positions: Tensor, attend: Attend, want: Tensor) -> Tensor:
        """Run the model once on `tokens` [T] at `positions` [T], both int64; `attend` is each layer's attention.

        Returns the logits [n, V] float32 of the tokens `want` [n] (int64 indices into T; may be empty). Which token
        sees which is up to `attend` alone. Queries and keys come to it rotated to `positions`.
        """

        return _run(self.hf, tokens, positions, _packed(attend), want)

    def dense(
        self,
        tokens: Tensor,
        positions: Tensor,
        visible: Tensor,
        *,
        group: Tensor | None = None,
        groups: Sequence[tuple[float, float]] = (),
    ) -> Tensor:
        """The slow reference: logits [T, V] float32 of one forward with transformers' own eager attention.

        tokens [T], positions [T] int64 (may be negative); visible [T, T] bool, row attends to column. Sliding windows
        apply on top, by distance of positions. None of kvgraph's attention is in it. group [T, T], groups: columns that
        a row weighs together, with (temperature, scale) of each group, as in `kvgraph.plan.Dense`; transformers has
        nothing like that, so attention is then spelled out.
        """
        tokens, positions, visible = (t.to(self.device) for t in (tokens, positions, visible))
        distance = positions[:, None] - positions[None]
        windows = {layer.window for layer in self.layers}
        seen = {w: visible if w is None else visible & (distance < w) for w in windows}
        # Float masks on purpose: eager attention would add a bool one to the scores.
        zeros = torch.zeros(visible.shape, dtype=self.dtype, device=self.device)
        masks = {window: zeros.masked_fill(~mask, -math.inf)[None, None] for window, mask in seen.items()}
        members = [] if group is None else [group.to(self.device) == i for i in range(1, len(groups) + 1)]

        def layer(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, **kwargs: Any) -> Tensor:
            window = self.layers[_index(module)].window
            if members:
                return _grouped_attention(q, k, v, seen[window], list(zip(members, groups, strict=True)), **kwargs)
            eager = sys.modules[type(module).__module__].eager_attention_forward
            return eager(module, q, k, v, masks[window], **kwargs)[0]

        return _run(self.hf, tokens, positions, layer, torch.arange(len(tokens), device=self.device))


class Trainable:
    """A causal LM as training sees it; made by `trainable`. Its weights change, so it has no fingerprint: an engine
    runs `wrap(trainable.hf)`, made anew after every change.

    hf: the transformers model, whose attention is ours from now on. layers, limit: as in Model.
    """

    def __init__(self, hf: PreTrainedModel, layers: tuple[Layer, ...]):
        self.hf, self.layers = hf, layers
        self.limit = _limit(hf.config)

    def forward(
        self, tokens: Tensor, positions: Tensor, attend: Attend, want: Tensor, module: Callable[..., Any] | None = None
    ) -> Tensor:
        """What `Model.forward` does, to be backpropagated through; `attend` may run again in the backward pass.

        module: what to call instead of hf, where something wraps it (peft, DistributedDataParallel, FSDP).
        """
        return _call(module or self.hf, tokens, positions, _packed(attend), want)


def load(
    path_or_name: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "cpu",
    allow_untested: bool = False,
) -> Model:
    """Load a causal LM from a folder or hub name, with safetensors weights.

    dtype: "auto" (the checkpoint's), "float32", "float16", "bfloat16" or a torch dtype. The tokenizer is None when the
    folder has none. allow_untested: accept model types that kvgraph doesn't test; what can be checked still is.
    Raises ModelError with the reason.
    """
    name, target = str(path_or_name), _device(device)
    wanted = _DTYPES.get(dtype, dtype) if isinstance(dtype, str) else dtype
    if wanted != "auto" and wanted not in _DTYPES.values():
        raise ModelError(f"dtype {dtype} isn't supported; use auto, {', '.join(_DTYPES)}")
    local = Path(name).expanduser().is_dir()
    if local and not (Path(name).expanduser() / "config.json").is_file():
        raise ModelError(f"{name} has no config.json; give the folder of a saved transformers model")
    if not local and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise ModelError(f"there is no folder {name}")
    source = str(Path(name).expanduser()) if local else name
    with one_line(f"can't read the config of {name}" + ("" if local else " (no such folder; tried as a hub name)")):
        config = AutoConfig.from_pretrained(source)
    _refuse(config, allow_untested)
    if not local:
        from huggingface_hub import snapshot_download

        with one_line(f"can't get {name} from the hub"):
            kinds = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
            source = snapshot_download(name, allow_patterns=kinds, ignore_patterns=["*/*", "consolidated*"])
    files = _weight_files(Path(source), name)
    with one_line(f"can't load {name}"), _shapes_explained():
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source, config=config, dtype=wanted, use_safetensors=True, output_loading_info=True
        )
    hf, info = loaded
    if info["missing_keys"]:
        raise ModelError(f"{name} lacks weights, for example {min(info['missing_keys'])}; is the download complete?")
    with one_line(f"can't put {name} on {target}"):
        hf = hf.to(target)
    weights = [_file_hash(f) for f in files]
    model = _build(hf, _tokenizer(Path(source), name), name, weights, allow_untested)
    try:
        model.tuned_for += _declared(_card(Path(source)), f"{name}'s model card")
    except ModelError as error:
        warnings.warn(f"{error}; until then it declares nothing", stacklevel=2)
    return model


def wrap(
    hf_model: PreTrainedModel, tokenizer: Any = None, *, name: str | None = None, allow_untested: bool = False
) -> Model:
    """A Model of a transformers model that is already in memory; its fingerprint hashes the state dict as it is now.

    Don't change its weights, dtype or device afterwards. Raises ModelError with the reason if it isn't supported.
    """
    _refuse(hf_model.config, allow_untested)
    shown = name or hf_model.config.name_or_path or type(hf_model).__name__
    return _build(hf_model, tokenizer, shown, [_state_hash(hf_model)], allow_untested)


def trainable(hf_model: PreTrainedModel, *, allow_untested: bool = False) -> Trainable:
    """Prepare a transformers model in memory for training through plans. Its train or eval mode stays as it is.

    From now on it runs only by what `Trainable.forward` gives it, also where activation checkpointing runs a layer
    again; `hf_model.set_attn_implementation("sdpa")` ends that. Raises ModelError with the reason if it isn't supported.
    """
    _refuse(hf_model.config, allow_untested)
    was_training = hf_model.training
    name = hf_model.config.name_or_path or type(hf_model).__name__
    layers = _build(hf_model, None, name, [], allow_untested).layers
    hf_model.train(was_training)
    hf_model.config._attn_implementation = _IMPLEMENTATION
    return Trainable(hf_model, layers)


def deepen(hf_model: PreTrainedModel, count: int) -> None:
    """Put copies of a transformers model's last `count` layers on top of it: what it does with a token it then does once
    more with the outcome. Raises ModelError where there aren't so many.

    Source: progressive stacking (Gong et al., Efficient Training of BERT by Progressively Stacking, ICML 2019).
    """
    layers, config = hf_model.model.layers, hf_model.config
    if not 0 < count <= len(layers):
        raise ModelError(f"the model has {len(layers)} layers, so {count} can't be copied")
    for layer in list(layers)[-count:]:
        configs = {id(m.config): m.config for m in layer.modules() if hasattr(m, "config")}  # stay the model's own
        above = copy.deepcopy(layer, configs)
        above.self_attn.layer_idx = len(layers)
        layers.append(above)
    if getattr(config, "layer_types", None):
        config.layer_types = [*config.layer_types, *config.layer_types[-count:]]
    config.num_hidden_layers = len(layers)


def save(
    hf_model: PreTrainedModel,
    folder: str | Path,
    tokenizer: Any = None,
    *,
    weights: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write a transformers model and its tokenizer as an ordinary folder with safetensors weights, which `load` reads.

    weights: instead of the model's own, by the names of its parameters. dtype: of the files [default: the model's].
    Raises OSError, SafetensorError where they can't be written.
    """
    folder, dtype = Path(folder), dtype or hf_model.dtype
    if weights is None:
        kept = hf_model.state_dict().keys()
        weights = {name: t for name, t in (*hf_model.named_parameters(), *hf_model.named_buffers()) if name in kept}
    with _no_bar():
        hf_model.save_pretrained(folder, state_dict={name: t.detach().to(dtype) for name, t in weights.items()})
    config = folder / "config.json"  # it says the dtype of the model in memory
    said = json.loads(config.read_text(encoding="utf-8")) | {"dtype": str(dtype).removeprefix("torch.")}
    config.write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8")
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def load_tokenizer(path_or_name: str | Path) -> Any:
    """The tokenizer of a folder or hub name, without the model's weights. Raises ModelError with the reason."""
    name = str(path_or_name)
    folder = Path(name).expanduser()
    if not folder.is_dir():
        with one_line(f"can't get the tokenizer of {name} (no such folder; tried as a hub name)"):
            return AutoTokenizer.from_pretrained(name)
    tokenizer = _tokenizer(folder, name)
    if tokenizer is None:
        raise ModelError(f"{name} has no tokenizer")
    return tokenizer


def _build(hf: PreTrainedModel, tokenizer: Any, name: str, weights: list[str], allow_untested: bool) -> Model:
    if hf.dtype not in _DTYPES.values():
        raise ModelError(f"{name} is in {hf.dtype}, which isn't supported; use {', '.join(_DTYPES)}")
    hf.eval()
    tested = hf.config.model_type in TESTED
    with nullcontext() if tested else one_line(f"{name} can't be run"):
        plain = None if tested else _plain(hf)
        rotaries, layers = _probe(hf, _exact_angles(hf))
        model = Model(hf, tokenizer, name, _fingerprint(hf, weights, rotaries, layers), rotaries, layers)
        if plain is not None:
            _require_equal(model, *plain)
    return model


# -- running the model with our attention ----------------------------------------------------------------------------

_LOCKS: WeakKeyDictionary[PreTrainedModel, threading.RLock] = WeakKeyDictionary()
_LayerCall = Callable[..., Tensor]  # (module, q [1, H, T, D], k, v, **what the model passes) -> [1, T, H, Dv]


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    attend: _LayerCall | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    if attend is None:
        raise ModelError(
            f"{type(module).__name__} can't be run: its model passes no keyword arguments on to it, "
            "or was called directly after kvgraph.models.trainable"
        )
    if attention_mask is not None:
        raise ModelError(f"{type(module).__name__} can't be run: its model makes a mask of its own")
    return attend(module, query, key, value, **kwargs).contiguous(), None


# The mask function must be there too and give None: jumping position_ids would otherwise make block masks.
AttentionInterface.register(_IMPLEMENTATION, _attention)
AttentionMaskInterface.register(_IMPLEMENTATION, lambda *args, **kwargs: None)


def _run(hf: PreTrainedModel, tokens: Tensor, positions: Tensor, attend: _LayerCall, want: Tensor) -> Tensor:
    """One forward of [T] tokens; `attend` is every layer's attention. Returns the logits [n, V] float32 of `want`."""
    with _LOCKS.setdefault(hf, threading.RLock()), torch.no_grad(), _attention_set(hf.config, _IMPLEMENTATION):
        return _call(hf, tokens, positions, attend, want)


def _call(module: Callable[..., Any], tokens: Tensor, positions: Tensor, attend: _LayerCall, want: Tensor) -> Tensor:
    """What `_run` does, of a model (or what wraps one) whose attention is set to ours already."""
    result = module(
        input_ids=tokens[None],
        position_ids=positions[None],
        attention_mask=None,
        past_key_values=None,
        use_cache=False,
        logits_to_keep=want,
        attend=attend,
    )
    return result.logits[0].float()


def _packed(attend: Attend) -> _LayerCall:
    """An Attend as a layer of the one packed sequence calls it."""

    def layer(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, scaling: float, **kwargs: Any) -> Tensor:
        out = attend(_index(module), q[0], k[0], v[0], scaling, kwargs.get("softcap"), kwargs.get("s_aux"))
        return out.transpose(0, 1)[None]

    return layer


def _grouped_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seen: Tensor,
    groups: Sequence[tuple[Tensor, tuple[float, float]]],
    scaling: float,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """Attention where each group of columns competes as one, by the definition in `kvgraph.plan.Group`.

    q [1, H, T, D], k [1, G, T, D], v [1, G, T, Dv]; seen [T, T] bool; groups: (columns [T, T] bool, (temperature,
    scale)); s_aux: sinks [H]. Returns [1, T, H, Dv], computed in float32.
    """
    dtype, heads = q.dtype, q.shape[1]
    q, k, v = (t[0].float().repeat_interleave(heads // t.shape[1], 0) for t in (q, k, v))

    def scores(columns: Tensor, temperature: float = 1.0) -> Tensor:
        s = q @ k.mT * scaling / temperature
        s = s if softcap is None else torch.tanh(s / softcap) * softcap
        return s.masked_fill(~(seen & columns), -math.inf)

    alone = ~torch.stack([columns for columns, _ in groups]).any(0)
    competing, outputs = [scores(alone)], []  # competing: [H, T, T], then [H, T, 1] a group and for the sinks
    for columns, (temperature, scale) in groups:
        inside = scores(columns, temperature)
        outputs.append(torch.softmax(inside, -1).nan_to_num(0) @ v)  # NaN where a row sees nothing of the group
        competing.append(torch.logsumexp(inside, -1, keepdim=True) * scale)
    if s_aux is not None:
        competing.append(s_aux.float()[:, None, None].expand(-1, q.shape[1], 1))
    weights = torch.softmax(torch.cat(competing, -1), -1)
    width = seen.shape[-1]
    out = weights[..., :width] @ v
    for i, output in enumerate(outputs, width):
        out = out + weights[..., i : i + 1] * output
    return out.transpose(0, 1)[None].to(dtype)


def _index(module: nn.Module) -> int:
    """The layer an attention module belongs to."""
    return cast(int, module.layer_idx)


@contextmanager
def _attention_set(config: PreTrainedConfig, implementation: str) -> Iterator[None]:
    """Attention runs by `implementation` inside; outside, the model keeps the one it was loaded with."""
    before = config._attn_implementation
    config._attn_implementation = implementation
    try:
        yield
    finally:
        config._attn_implementation = before


# -- rotary tables ---------------------------------------------------------------------------------------------------


class _Angles:
    """Stands in for a rotary module's forward: the same cosines and sines, from float64 angles.

    tables: by layer type (None where the model has one table for all): (inv_freq [R/2] float64, attention scaling).
    layout: how the module lays the R/2 values out for its apply function, see _LAYOUTS.
    """

    def __init__(self, tables: dict[str | None, tuple[Tensor, float]], layout: str):
        self.tables, self.layout = tables, layout

    def __call__(self, x: Tensor, position_ids: Tensor, layer_type: str | None = None) -> tuple[Tensor, Tensor]:
        inv_freq, scaling = self.tables[layer_type]
        angle = position_ids.to(torch.float64)[..., None] * inv_freq.to(position_ids.device)
        spread = _LAYOUTS[self.layout]
        return spread(angle.cos() * scaling).to(x.dtype), spread(angle.sin() * scaling).to(x.dtype)


_LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "once": lambda t: t,
    "halves": lambda t: torch.cat([t, t], -1),
    "pairs": lambda t: t.repeat_interleave(2, -1),
}


def _exact_angles(hf: PreTrainedModel) -> list[Tensor]:
    """Give every rotary module of the model float64 angles; returns the distinct tables, each [R/2] float64."""
    found: dict[bytes, Tensor] = {}
    for module in hf.modules():
        if not _table_names(module):
            continue
        if not isinstance(module.forward, _Angles):  # a model may be wrapped more than once
            module.forward = _angles(module, hf.device)
        for inv_freq, _ in module.forward.tables.values():
            found[inv_freq.cpu().numpy().tobytes()] = inv_freq.cpu()
    return list(found.values())


def _table_names(module: nn.Module) -> list[str]:
    names = [name for name, _ in module.named_buffers(recurse=False)]
    return [n for n in names if n == "inv_freq" or (n.endswith("_inv_freq") and not n.endswith("original_inv_freq"))]


def _angles(module: nn.Module, device: torch.device) -> _Angles:
    who = type(module).__name__
    try:
        # A fresh one, because `model.to(bfloat16)` rounds the tables of a live one.
        fresh = type(module)(module.config).cpu()
    except (AttributeError, TypeError) as error:
        raise ModelError(f"{who} isn't a rotary embedding that kvgraph knows ({error})") from None
    tables: dict[str | None, tuple[Tensor, float]] = {}
    for name in _table_names(fresh):
        live, exact = getattr(module, name).float().cpu(), getattr(fresh, name)
        if live.shape != exact.shape or not torch.allclose(live, exact, rtol=1e-2):
            raise ModelError(f"{who}.{name} was changed after the model was made; kvgraph takes it from the config")
        kind = name.removesuffix("inv_freq")
        tables[kind.removesuffix("_") or None] = (
            exact.double(),
            float(getattr(fresh, f"{kind}attention_scaling", 1.0)),
        )
    positions = torch.arange(5)[None]
    for layout in _LAYOUTS:
        angles = _Angles(tables, layout)
        if all(_same_tables(fresh, angles, positions, kind) for kind in tables):
            return _Angles({k: (t.to(device), scaling) for k, (t, scaling) in tables.items()}, layout)
    raise ModelError(f"{who} lays its angles out in a way that kvgraph doesn't know")


def _same_tables(fresh: nn.Module, angles: _Angles, positions: Tensor, kind: str | None) -> bool:
    x = torch.zeros(1)
    theirs = fresh(x, positions) if kind is None else fresh(x, positions, kind)
    ours = angles(x, positions, kind)
    return all(a.shape == b.shape and torch.allclose(a, b, atol=1e-5) for a, b in zip(theirs, ours, strict=True))


# -- what each layer does, observed ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Seen:
    """What one layer gave its attention. q [H, T, D], k [G, T, D], v [G, T, Dv], rotated."""

    q: Tensor
    k: Tensor
    v: Tensor
    window: int | None


def _probe(hf: PreTrainedModel, tables: list[Tensor]) -> tuple[tuple[Rotary, ...], tuple[Layer, ...]]:
    """Run tokens once at two sets of positions and find, for every layer, the rotation that turns one into the other.

    Attention gives back the token's own value, so hidden states depend on no position, and queries and keys only
    through rotation; whatever isn't so can't be composed and is refused.
    """
    moves = torch.tensor([1, 7, 150, 1_000, 5_000, 20_000])  # far ones tell slow frequencies apart
    n, limit = len(moves), _limit(hf.config)
    if limit < 2 * n:
        raise ModelError(f"the model's limit of {limit} positions is too small")
    moves %= limit - n
    tokens = torch.arange(n) % _vocabulary(hf)
    positions = torch.arange(n)
    seen: dict[int, _Seen] = {}

    def observe(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, **kwargs: Any) -> Tensor:
        layer = _index(module)
        if not getattr(module, "is_causal", True):
            raise ModelError(f"layer {layer} has bidirectional attention")
        if kwargs.get("position_bias") is not None:
            raise ModelError(f"layer {layer} adds a position bias to its scores")
        if kwargs.get("scaling") is None:
            raise ModelError(f"layer {layer} doesn't say how it scales its scores")
        seen[layer] = _Seen(q[0].float().cpu(), k[0].float().cpu(), v[0].float().cpu(), kwargs.get("sliding_window"))
        return v.repeat_interleave(q.shape[1] // v.shape[1], 1).transpose(1, 2)

    both = torch.cat([tokens, tokens]).to(hf.device), torch.cat([positions, positions + moves]).to(hf.device)
    _run(hf, *both, observe, torch.empty(0, dtype=torch.int64, device=hf.device))
    if sorted(seen) != list(range(hf.config.num_hidden_layers)):
        raise ModelError(
            f"only layers {sorted(seen)} of {hf.config.num_hidden_layers} use transformers' attention interface"
        )
    tolerance = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}[hf.dtype]
    candidates = [None, *(Rotary(t, interleaved) for t in tables for interleaved in (False, True))]
    rotaries: list[Rotary] = []
    layers = []
    for index in range(len(seen)):
        one = seen[index]
        if _error(None, one.v, moves) > tolerance:
            raise ModelError(f"layer {index}'s values depend on positions (learned absolute positions?)")
        fitting = [r for r in candidates if r is None or r.dims <= one.k.shape[-1]]
        found = min(fitting, key=lambda rotary: _error(rotary, one.k, moves))
        if _error(found, one.k, moves) > tolerance:
            raise ModelError(f"layer {index}'s keys don't follow any rotary table of the model")
        if _error(found, one.q, moves) > tolerance:
            raise ModelError(f"layer {index}'s queries depend on positions by more than their rotation")
        if found is not None and found not in rotaries:
            rotaries.append(found)
        rotary = None if found is None else rotaries.index(found)
        layers.append(Layer(rotary, one.window, one.k.shape[0], one.k.shape[-1], one.v.shape[-1]))
    _check_windows(hf.config, layers)
    return tuple(rotaries), tuple(layers)


def _error(rotary: Rotary | None, x: Tensor, moves: Tensor) -> float:
    """How far the first half of x [heads, 2n, D], moved, is from the second: root mean square, relative to x's."""
    first, second = x.chunk(2, 1)
    moved = first if rotary is None else rotary.rotate(first, *rotary.table(moves))
    return float((moved - second).norm() / second.norm().clamp_min(1e-30))


def _check_windows(config: PreTrainedConfig, layers: list[Layer]) -> None:
    types = getattr(config, "layer_types", None) or []
    if not types and getattr(config, "sliding_window", None) and all(layer.window is None for layer in layers):
        raise ModelError("the config has a sliding window that no layer's attention is told of")
    for index, (kind, layer) in enumerate(zip(types, layers, strict=False)):
        if (kind == "sliding_attention") != (layer.window is not None):
            raise ModelError(f"layer {index} is declared {kind} but its attention runs with window {layer.window}")


def _plain(hf: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """Tokens [T] and their logits [T, V] by the untouched model (eager: sdpa has ignored softcaps in some versions)."""
    n = min(64, _limit(hf.config))
    tokens = torch.arange(n, device=hf.device) * 7 % _vocabulary(hf)
    with torch.no_grad(), _attention_set(hf.config, "eager"):
        return tokens, hf(input_ids=tokens[None], use_cache=False).logits[0].float()


def _require_equal(model: Model, tokens: Tensor, logits: Tensor) -> None:
    """An untested model must at least give its own plain logits back: catches masks the probe can't see."""
    n = len(tokens)
    ours = model.dense(tokens, torch.arange(n), torch.ones(n, n, dtype=torch.bool).tril())
    limit = {torch.float32: 1e-3, torch.float16: 0.1, torch.bfloat16: 0.5}[model.dtype]
    worst = float((ours - logits).abs().max() / logits.std())
    if not worst <= limit:
        raise ModelError(f"{model.name} differs from its own plain forward by {worst:.2g} standard deviations")


# -- what can't work -------------------------------------------------------------------------------------------------

_RECURRENT = "has recurrent or linear-attention layers, whose state can't be composed like a KV cache"
_LEARNED = "has learned absolute positions, so a cached segment can't be moved"
_ALIBI = "biases its scores by position (ALiBi)"
_BY_TYPE = {
    **dict.fromkeys(
        "mamba mamba2 falcon_mamba falcon_h1 jamba bamba zamba zamba2 recurrent_gemma rwkv xlstm".split(), _RECURRENT
    ),
    **dict.fromkeys(
        "nemotron_h granitemoehybrid qwen3_next minimax lfm2 lfm2_moe kimi_linear olmo_hybrid".split(), _RECURRENT
    ),
    **dict.fromkeys("gpt2 openai-gpt gpt_neo gpt_bigcode opt xglm biogpt ctrl xlnet".split(), _LEARNED),
    **dict.fromkeys("bloom mpt".split(), _ALIBI),
    "ministral3": "scales queries by position",
}


def _reason(config: PreTrainedConfig) -> str | None:
    """Why a model of this config can't be composed, if so."""
    ropes = _rope_parameters(config)
    types = {str(rope.get("rope_type", rope.get("type", "default"))) for rope in ropes}
    layer_types = set(getattr(config, "layer_types", None) or []) - {"full_attention", "sliding_attention", "attention"}
    if config.model_type in _BY_TYPE:
        return _BY_TYPE[config.model_type]
    if getattr(config, "is_encoder_decoder", False):
        return "is an encoder-decoder"
    if any(rope.get("mrope_section") for rope in ropes) or "mrope" in types:
        return "has multi-dimensional rotary positions (mrope)"
    if any("llama_4_scaling_beta" in rope for rope in ropes) or getattr(config, "attn_temperature_tuning", False):
        return "scales queries by position"
    if any("dynamic" in t for t in types):
        return "has dynamic NTK rotary scaling: keys would depend on the length of the whole context"
    if types & {"longrope", "su"}:
        return "has longrope rotary scaling: keys would depend on the length of the whole context"
    if getattr(config, "kv_lora_rank", None):
        return "has multi-head latent attention (MLA), whose compressed KV isn't supported"
    if getattr(config, "attention_chunk_size", None) or "chunked_attention" in layer_types:
        return "has chunked attention, which depends on absolute positions"
    if layer_types:
        return f"has {', '.join(sorted(layer_types))} layers; only full and sliding-window attention can be composed"
    if getattr(config, "alibi", False):
        return _ALIBI
    if getattr(config, "use_bidirectional_attention", None) or not getattr(config, "is_causal", True):
        return "has bidirectional attention"
    return None


def _rope_parameters(config: PreTrainedConfig) -> list[dict[str, Any]]:
    """The rope parameters of a config: one dict, or one for every layer type."""
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    nested = [r for r in rope.values() if isinstance(r, dict)]
    return nested or [rope]


def _refuse(config: PreTrainedConfig, allow_untested: bool) -> None:
    """Raise ModelError if a model of this config can't be, or mayn't be, run."""
    text = config.get_text_config()
    reason = _reason(text) or (None if text is config else "isn't a text-only causal LM; save its text model by itself")
    if reason:
        raise ModelError(f"model type {config.model_type} isn't supported: it {reason}")
    if config.model_type not in TESTED and not allow_untested:
        raise ModelError(
            f"model type {config.model_type} isn't among the tested ones ({', '.join(sorted(TESTED))}); "
            "--allow-untested tries it all the same"
        )


def _limit(config: PreTrainedConfig) -> int:
    """Positions the model may use. YaRN stretches the length that the config gives as the original one."""
    limit = getattr(config, "max_position_embeddings", None)
    if not limit:
        raise ModelError("the model's config gives no max_position_embeddings")
    for rope in _rope_parameters(config):
        if rope.get("rope_type") == "yarn" and rope.get("original_max_position_embeddings"):
            limit = max(limit, int(rope["original_max_position_embeddings"] * rope["factor"]))
    return limit


def _vocabulary(hf: PreTrainedModel) -> int:
    return cast(nn.Embedding, hf.get_input_embeddings()).weight.shape[0]


def _eos_ids(hf: PreTrainedModel) -> tuple[int, ...]:
    generation = getattr(hf, "generation_config", None)
    eos = getattr(generation, "eos_token_id", None)
    if eos is None:
        eos = getattr(hf.config, "eos_token_id", None)
    if eos is None:
        return ()
    return (eos,) if isinstance(eos, int) else tuple(eos)


def _declared(data: dict[str, Any], where: str) -> tuple[str, ...]:
    """The methods a config or card declares tuning for."""
    entry = data.get("kvgraph") or {}
    methods = entry.get("tuned_for", []) if isinstance(entry, dict) else None
    if not isinstance(methods, list) or not all(isinstance(m, str) for m in methods):
        raise ModelError(f'{where}: its "kvgraph" entry must look like {{"tuned_for": ["block"]}}')
    return tuple(methods)


def _card(folder: Path) -> dict[str, Any]:
    """The front matter of a model card; empty where there is none, or none that can be read: it is only a note."""
    path = folder / "README.md"
    if not path.is_file():
        return {}
    from huggingface_hub import metadata_load

    try:
        data = metadata_load(path)
    except Exception as error:
        warnings.warn(
            f"{path}: its front matter can't be read ({type(error).__name__}), so it declares nothing", stacklevel=2
        )
        return {}
    return data if isinstance(data, dict) else {}


# -- fingerprint -----------------------------------------------------------------------------------------------------


def _fingerprint(
    hf: PreTrainedModel, weights: list[str], rotaries: tuple[Rotary, ...], layers: tuple[Layer, ...]
) -> str:
    """SHA-256 of all that can change KV: weights, config, dtype, rotation, layers and our numerics. Not the path."""
    config = {k: v for k, v in hf.config.to_dict().items() if k not in _NOT_KV}
    facts = {
        "numerics": ATTENTION_NUMERICS,
        "weights": sorted(weights),
        "config": config,
        "dtype": str(hf.dtype),
        "rope": [(r.inv_freq.tolist(), r.interleaved) for r in rotaries],
        "layers": [asdict(layer) for layer in layers],
        "adapter": None,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def _state_hash(hf: PreTrainedModel) -> str:
    h = xxhash.xxh3_128()
    for name, tensor in sorted(hf.state_dict().items()):
        h.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        h.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return h.hexdigest()


def _file_hash(path: Path) -> str:
    """xxh3-128 of a file's content, remembered by its path, size and modification time."""
    status = path.stat()
    key, now = str(path.resolve()), [status.st_size, status.st_mtime_ns]
    known = memo.recall("weights", key)
    if isinstance(known, list) and known[:2] == now:
        return str(known[2])
    h = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            h.update(block)
    # A file written this instant could change again under the same time stamp, so it isn't remembered yet.
    if time.time_ns() - status.st_mtime_ns > 2_000_000_000:
        memo.remember("weights", key, [*now, h.hexdigest()])
    return h.hexdigest()


# -- files -----------------------------------------------------------------------------------------------------------


def _weight_files(folder: Path, name: str) -> list[Path]:
    """The safetensors files that transformers will load from a folder."""
    if (folder / "adapter_config.json").exists():
        raise ModelError(f"{name} holds an adapter, which isn't supported yet; merge it into the model and save that")
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if index.is_file():
        with one_line(f"can't read {index}"):
            shards = json.loads(index.read_text(encoding="utf-8")).get("weight_map")
        if not isinstance(shards, dict) or not shards:
            raise ModelError(f"{index} has no weight map")
        files = [folder / shard for shard in sorted(set(shards.values()))]
        for file in files:
            if not file.is_file():
                raise ModelError(f"{name} lacks {file.name}; is the download complete?")
        return files
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")) or any(folder.glob("*.pth")):
        raise ModelError(
            f"{name} has only pickled weights, which can run code when loaded; save it as safetensors first"
        )
    raise ModelError(f"{name} has no model.safetensors")


def _tokenizer(folder: Path, name: str) -> Any:
    if not any(
        (folder / f).is_file() for f in ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
    ):
        return None
    with one_line(f"can't load the tokenizer of {name}"):
        return AutoTokenizer.from_pretrained(str(folder))


def _device(device: str | torch.device) -> torch.device:
    with one_line(f"unknown device {device}"):
        target = torch.device(device)
    if target.type == "cuda" and not torch.cuda.is_available():
        raise ModelError(f"device {device} isn't available: torch sees no GPU here")
    if target.type not in ("cpu", "cuda"):
        raise ModelError(f"device {device} isn't supported; use cpu or cuda")
    return target


@contextmanager
def _no_bar() -> Iterator[None]:
    """transformers draws no progress bar inside: it would run into that of whoever calls."""
    enabled = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            transformers_logging.enable_progress_bar()


@contextmanager
def _shapes_explained() -> Iterator[None]:
    """transformers' error about shapes points to a report that nobody sees."""
    try:
        yield
    except RuntimeError as error:
        if "ignore_mismatched_sizes" in str(error):
            raise ModelError("its weights don't have the shapes that its config.json says") from None
        raise


@contextmanager
def one_line(what: str) -> Iterator[None]:
    """Turn whatever a library raises into one ModelError line; its errors have no common base."""
    try:
        yield
    except ModelError as error:
        raise ModelError(f"{what}: {error}") from None
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(f"{what}: {lines[0]}") from None
