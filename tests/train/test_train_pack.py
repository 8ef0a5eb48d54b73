"""Training through plans: packed logits against the engine's, packed gradients against plain unpacked forwards."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import families
import strategies
from kvgraph import ContextGraph, Engine, GraphError, ModelError, PlanError, models
from kvgraph.edges import all_pairs
from kvgraph.methods import APE, METHODS, Block, CacheBlend, Full, GraphKV, KVLink, Method
from kvgraph.plan import Plan
from kvgraph.train import forward
from kvgraph.train.example import Example
from kvgraph.train.forward import logits, loss
from kvgraph.train.links import add_link_tokens, rows_of, train_only_rows
from kvgraph.train.pack import Packed, lay, pack
from soak import draws, some

VOCAB = 128
LONG = 1 << 12
GRAPH = ContextGraph([[5, 6, 7, 8], [9, 10, 11], [12, 13]], prefix=[3, 4])
QUESTIONS = [([20, 21], [30, 31, 32]), ([20, 22], [33]), ([23], [34, 35])]

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{message}")
    for message in ("this model doesn't declare tuning", "flex_attention called without", ".*is deprecated and will be")
]

token = st.integers(0, VOCAB - 1)
texts = st.lists(token, min_size=1, max_size=4)


@st.composite
def items(draw: st.DrawFn) -> tuple[Example, Method]:
    """An example with one to three questions that may begin alike, and any method that can be trained."""
    method, graph = draw(strategies.problems(VOCAB))
    assume(method.trains_by_mask)
    beginning = draw(st.lists(token, max_size=2))
    questions = draw(st.lists(st.tuples(texts, texts), max_size=2))
    return Example(
        graph.with_query([]), [(graph.query, draw(texts)), *((beginning + q, a) for q, a in questions)]
    ), method


@pytest.fixture(scope="module")
def llama() -> models.Trainable:
    return models.trainable(families.FAMILIES["llama"]())


@pytest.fixture(scope="module")
def exact() -> models.Trainable:
    """The model in float64, where a wrong gradient can't pass for rounding."""
    model = models.trainable(families.FAMILIES["llama"]())
    model.hf.double()
    return model


@pytest.fixture(scope="module")
def plain(exact):
    """The same with transformers' own attention, but with float64 angles: its own are float32, as is eager's softmax."""
    hf = families.FAMILIES["llama"]().double()
    hf.set_attn_implementation("sdpa")
    hf.model.rotary_emb = exact.hf.model.rotary_emb
    return hf


def alone(plain, items: Sequence[tuple[Example, Method]], document_weight: float = 0.0) -> torch.Tensor:
    """The loss by its definition: every question by itself, laid out by Plan.dense(), through a plain forward."""
    answers, documents = [], []
    for example, method in items:
        for i, (question, plan) in enumerate(zip(example.questions, example.plans(method), strict=True)):
            d = plan.dense()
            mask = torch.zeros(d.visible.shape, dtype=torch.float64).masked_fill(
                ~torch.from_numpy(d.visible), -torch.inf
            )
            positions = torch.from_numpy(d.positions - d.positions.min())
            out = plain(torch.from_numpy(d.tokens)[None], mask[None, None], positions[None], use_cache=False).logits[0]
            n = len(question.answer)
            answers.append(torch.nn.functional.cross_entropy(out[-n:], torch.tensor(question.answer), reduction="none"))
            if i == 0:
                documents += first_versions(example, plan, out)
    answer, document = torch.cat(answers), torch.cat([*documents, torch.empty(0)])
    return answer.mean() + (document_weight * document.mean() if document_weight and len(document) else 0)


def first_versions(example: Example, plan: Plan, out: torch.Tensor):
    """Losses of every distinct segment's own tokens, at the first span that holds it."""
    d, left = plan.dense(), set(map(tuple, example.graph.segments))
    for index, span in enumerate(plan.spans):
        if span.cached and span.tokens in left:
            left.remove(span.tokens)
            rows = np.flatnonzero(d.span == index)[: len(span)]
            yield torch.nn.functional.cross_entropy(
                out[rows[:-1]], torch.tensor(span.tokens[1:], dtype=torch.int64), reduction="none"
            )


def gradients(module: torch.nn.Module, value: torch.Tensor) -> dict[str, torch.Tensor]:
    module.zero_grad()
    value.backward()
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], relative: float = 1e-5) -> None:
    assert found.keys() == expected.keys() and found
    scale = max(float(g.norm()) for g in expected.values())  # below a small part of it, rounding shows
    for name, g in expected.items():
        assert (found[name] - g).norm() <= relative * max(float(g.norm()), 1e-4 * scale), name


def packed_loss(model: models.Trainable, sequences: Sequence[Packed], document_weight: float = 0.0) -> torch.Tensor:
    answers, documents = (sum(c) for c in zip(*(p.counts for p in sequences), strict=True))
    return sum(
        loss(logits(model, p), p, document_weight=document_weight, totals=(answers, documents)) for p in sequences
    )


@pytest.fixture(autouse=True)
def few_rows(monkeypatch):
    """Examples here are short: a few rows at a time, so that they have several strips."""
    monkeypatch.setattr(forward, "ROWS", 8)


# the engine


@pytest.mark.parametrize("family", some(sorted(families.FAMILIES), 4, turn=1))
def test_training_logits_are_the_engines_for_every_family_and_method(family):
    """What training sees at an answer is what the engine scores: log-probabilities within 1e-4, by either kernel."""
    hf = families.FAMILIES[family]()
    engine = Engine(models.wrap(hf), kv_budget=1 << 26)
    model = models.trainable(families.FAMILIES[family]())

    @settings(max_examples=draws(3))
    @given(items(), st.booleans())
    def agree(item, flex):
        example, method = item
        (packed,) = pack([item], LONG, limit=model.limit)
        with torch.no_grad():
            found = logits(model, packed, flex=flex).log_softmax(-1).gather(1, packed.targets[:, None])[:, 0]
        graph = example.graph
        expected = [engine.score(graph.with_query(q), a, method).scores for q, a, _ in example.questions]
        assert (found - torch.cat(expected)).abs().max() <= 1e-4

    agree()


@pytest.mark.parametrize("name", [name for name in METHODS if name != "ape"])
def test_whole_logits_are_the_engines(llama, name):
    """Every method by name, so that none is missing: the logits after the query, all of the vocabulary."""
    made = {"kvlink": KVLink(2, 100, 8, 98, 99), "cacheblend": CacheBlend(selected=[(1,), (), (0, 1)])}
    method = made[name] if name in made else METHODS[name]()
    graph = ContextGraph(GRAPH.segments, [20, 21], list(GRAPH.prefix), all_pairs(3) if name == "graph-kv" else ())
    engine = Engine(models.wrap(families.FAMILIES["llama"]()), kv_budget=1 << 26)
    (packed,) = pack([(Example.of(graph, [7]), method)], LONG)
    with torch.no_grad():
        assert (logits(llama, packed)[0] - engine.logits(method.plan(graph))).abs().max() <= 1e-4


# packing


@given(st.lists(items(), min_size=1, max_size=4), st.integers(80, 200), st.sampled_from([0.0, 0.5]))
def test_packed_gradients_are_those_of_plain_forwards_one_question_at_a_time(exact, plain, mixture, length, weight):
    try:
        sequences = pack(mixture, length, documents=weight > 0)
    except PlanError:  # an example that is longer than a sequence
        assume(False)
    found, expected = packed_loss(exact, sequences, weight), alone(plain, mixture, weight)
    assert abs(found - expected).item() <= 1e-5 * expected.item()
    assert_same(gradients(exact.hf, found), gradients(plain, expected))


@pytest.mark.parametrize(("softcap", "sinks"), [(None, False), (5.0, False), (None, True)])
def test_attention_on_the_cpu_is_no_less_precise_than_its_input(exact, softcap, sinks):
    """16 bits are widened there; float64 must stay what it is."""
    (packed,) = pack([(Example(GRAPH, QUESTIONS), Full())], LONG)
    q, k, v = torch.randn(3, 2, len(packed), 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    scores = q @ k.mT * 0.3
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~packed.visible(), -torch.inf).exp()
    sink = torch.tensor([0.1, -0.7], dtype=torch.float64) if sinks else None
    total = scores.sum(-1, keepdim=True) + (sink.exp()[:, None, None] if sink is not None else 0)
    found = forward._attention(exact, packed, False)(0, q, k, v, 0.3, softcap, sink)
    torch.testing.assert_close(found, scores / total @ v, rtol=0, atol=1e-13)


def meanings(tokens, positions, visible) -> list[int]:
    """What each row is: its token and what it sees, at which distance; equal only for rows that compute the same."""
    found: list[int] = []
    for row, (t, p) in enumerate(zip(tokens, positions, strict=True)):
        seen = sorted((int(positions[k] - p), found[k]) for k in np.flatnonzero(visible[row]) if k != row)
        found.append(hash((int(t), tuple(seen))))
    return found


@given(st.lists(items(), min_size=1, max_size=3))
def test_a_packed_row_sees_what_its_plan_says(mixture):
    (packed,) = pack(mixture, LONG)
    found = meanings(packed.tokens.numpy(), packed.positions.numpy(), packed.visible().numpy())
    expected, targets = [], []
    for example, method in mixture:
        for question, plan in zip(example.questions, example.plans(method), strict=True):
            d = plan.dense()
            expected += meanings(d.tokens, d.positions, d.visible)[-len(question.answer) :]
            targets += question.answer
    assert [found[row] for row in packed.rows] == expected
    assert packed.targets.tolist() == targets


def test_questions_share_their_context_and_their_beginning():
    example = Example(GRAPH, QUESTIONS)
    links = KVLink(2, 100, 8, 98, 99)
    (packed,) = pack([(example, links)], LONG)
    context, live = 2 + 1 + 9, 6 + 1  # prefix with mem_start, documents; links with mem_end
    assert len(packed) == context + live + 4 + 2 + 2
    (packed,) = pack([(Example(GRAPH, [QUESTIONS[0], QUESTIONS[0]]), Full())], LONG)
    assert len(packed) == 2 + 9 + 3 + 2  # the same question twice: the last row is each one's own
    assert packed.targets.tolist() == [30, 31, 32, 30, 31, 32]
    assert packed.rows[:2].tolist() == packed.rows[3:5].tolist() and packed.rows[2] != packed.rows[5]


def test_through_links_questions_see_no_document():
    """Question and answer see prefix and links alone; everything else is as it is without."""
    example, method = Example(GRAPH, QUESTIONS), KVLink(2, 100, 8, 98, 99)
    plain, hidden = lay(example, method), lay(example, method, through_links=True)
    assert [*plain.targets] == [*hidden.targets] and [*plain.tokens] == [*hidden.tokens]
    documents = torch.tensor([5 <= t < 20 for t in hidden.tokens.tolist()])
    live = torch.tensor([20 <= t < 98 for t in hidden.tokens.tolist()])
    links = (hidden.tokens >= 98) & ~documents
    visible = hidden.visible()
    assert not visible[live][:, documents].any()
    assert visible[live][:, links].all()  # memory tokens and the prefix's end among them
    assert visible[live][:, (hidden.tokens == 3) | (hidden.tokens == 4)].all()
    for token in (100, 105):  # the links still read the documents before them
        (row,) = (hidden.tokens == token).nonzero()[0]
        assert visible[row][documents].sum() == (4 if token == 100 else 9)
    for other in (Block(), Full(), KVLink(0)):
        with pytest.raises(PlanError, match="has no link tokens for a question to see"):
            lay(example, other, through_links=True)


def test_first_fit_in_order():
    def example(n: int) -> tuple[Example, Method]:
        return Example.of(ContextGraph([[7] * (n - 1)], [8]), [9]), Block()

    lengths = [6, 5, 4, 3, 2]
    sequences = pack(map(example, lengths), 10)
    assert [len(p) for p in sequences] == [10, 10]
    assert [int((p.positions == 0).sum()) for p in sequences] == [2, 3]  # 6 + 4, 5 + 3 + 2
    again = pack(map(example, lengths), 10)
    assert all(torch.equal(a.visible(), b.visible()) for a, b in zip(sequences, again, strict=True))


def test_a_sequence_of_many_examples_keeps_visibility_small():
    example = Example(ContextGraph([[5] * 50] * 10), [([i], [i]) for i in range(40)])
    (packed,) = pack([(example, Block())] * 6, LONG)
    assert packed.sees.numel() < len(packed) ** 2 / 100


def test_the_answer_goes_on_from_what_stands_before_it():
    """Without a query: from the last link or memory token; where there is none, the first token can't be learned."""

    def learned(method):
        (packed,) = pack([(Example(GRAPH, [([], [30, 31])]), method)], LONG)
        return list(zip(packed.tokens[packed.rows].tolist(), packed.targets.tolist(), strict=True))

    assert learned(KVLink(1, 100, 8)) == [(102, 30), (30, 31)]
    assert learned(KVLink(mem_start=98, mem_end=99)) == [(99, 30), (30, 31)]
    assert learned(Block()) == learned(METHODS["epic"](1)) == [(30, 31)]


def test_documents_are_learned_once_in_their_first_version():
    graph = ContextGraph([[5, 6, 7], [9, 10], [9, 10]], prefix=[3, 4], edges=all_pairs(3))
    (packed,) = pack([(Example(graph, QUESTIONS), GraphKV())], LONG, documents=True)
    rows = packed.rows[packed.documents]
    assert packed.tokens[rows].tolist() == [5, 6, 9]
    assert packed.targets[packed.documents].tolist() == [6, 7, 10]
    assert packed.visible()[rows].sum(1).tolist() == [1, 2, 1]  # alone, so round 0
    assert packed.counts == (6, 3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Example(ContextGraph(["text"]), [([1], [2])]), "call graph.tokenized"),
        (lambda: Example(GRAPH.with_query([1]), [([1], [2])]), "use Example.of"),
        (lambda: Example(GRAPH, []), "at least one question"),
        (lambda: Example(GRAPH, [([1], [2]), ([1], [])]), "nothing of question 1's answer is learned"),
        (lambda: pack([(Example(GRAPH, [([], [2])]), Block())], LONG), "the query is empty"),
        (lambda: pack([(Example(GRAPH, QUESTIONS), CacheBlend())], LONG), "plan with an engine"),
    ],
)
def test_refused(make, message):
    with pytest.raises(GraphError, match=message):
        make()


def test_what_cannot_be_packed():
    item = Example(GRAPH, QUESTIONS), Block()
    with pytest.raises(PlanError, match="ape weighs groups of keys"):
        pack([(item[0], APE())], LONG)
    with pytest.raises(PlanError, match="example 1 has 19 tokens by block, more than the 18"):
        pack([(Example(GRAPH, QUESTIONS[:1]), Block()), item], 18)
    with pytest.raises(PlanError, match="example 0 has position 14, but the model's limit is 14"):
        pack([item], LONG, limit=14)
    assert pack([item], 19, limit=15)


# the forward pass


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3_text"])
def test_flex_attention_and_padding_change_nothing(family):
    model = models.trainable(families.FAMILIES[family]())
    long = Example(ContextGraph([[*range(40, 80)], [*range(90, 120)]], prefix=[3]), QUESTIONS)
    (packed,) = pack([(long, Full()), (Example(GRAPH, QUESTIONS), KVLink(2, 100, 8))], LONG)
    padded = packed.padded(256)
    assert len(padded) == 256 and padded.counts == packed.counts
    assert padded.visible()[len(packed) :].sum(1).eq(1).all()  # so no row is NaN
    unpadded = packed.padded(len(packed))
    assert unpadded.sees.shape == padded.sees.shape
    with torch.no_grad():
        expected = logits(model, packed, flex=False)
        for other, flex in ((unpadded, False), (padded, False), (padded, True), (packed, True)):
            assert (logits(model, other, flex=flex) - expected).abs().max() <= 1e-4
    with pytest.raises(ValueError, match="can't be padded"):
        packed.padded(8)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
def test_a_few_rows_at_a_time_give_the_gradients_of_all_at_once(family, monkeypatch):
    long = Example(ContextGraph([[*range(40, 80)], [*range(90, 120)]], prefix=[3]), QUESTIONS)

    def gradients() -> list[torch.Tensor]:
        model = models.trainable(families.FAMILIES[family]())
        packed_loss(model, pack([(long, Block()), (long, Full())], LONG)).backward()
        return [p.grad for p in model.hf.parameters() if p.grad is not None]

    few = gradients()
    monkeypatch.setattr(forward, "ROWS", 10**6)
    for mine, expected in zip(few, gradients(), strict=True):
        assert (mine - expected).abs().max() <= 1e-5 * max(1, expected.abs().max())


def test_a_block_mask_skips_what_nobody_sees():
    from torch.nn.attention.flex_attention import create_block_mask

    item = Example.of(ContextGraph([[5] * 200], [8]), [9]), Block()
    (packed,) = pack([item] * 4, LONG)
    p = packed.padded(1024)
    assert create_block_mask(p.mask_mod(), None, None, 1024, 1024, "cpu").sparsity() > 60


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
def test_activation_checkpointing_gives_the_same_gradients(family):
    """The backward pass runs layers again, after `logits` has returned: attention must still be ours there."""
    model = models.trainable(families.FAMILIES[family]())
    model.hf.train()
    sequences = pack([(Example(GRAPH, QUESTIONS), Block())], LONG)
    expected = gradients(model.hf, packed_loss(model, sequences))
    model.hf.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert_same(gradients(model.hf, packed_loss(model, sequences)), expected, 1e-6)


def test_bf16_autocast_trains(llama):
    sequences = pack([(Example(GRAPH, QUESTIONS), KVLink(2, 100, 8))], LONG)
    expected = gradients(llama.hf, packed_loss(llama, sequences))
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients(llama.hf, packed_loss(llama, sequences))
        with torch.no_grad():
            values = [loss(logits(llama, packed, flex=flex), packed) for packed in sequences for flex in (False, True)]
    assert_same(found, expected, 0.3)
    assert any(not torch.equal(found[name], expected[name]) for name in found)
    assert (values[0] - values[1]).abs() < 0.1


def test_a_model_in_training_says_how_it_is_called(llama):
    with pytest.raises(ModelError, match="called directly after kvgraph.models.trainable"):
        llama.hf(torch.tensor([[1, 2]]))
    with pytest.raises(ModelError, match="isn't supported"):
        import transformers

        models.trainable(transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=1, n_embd=16, n_head=2)))


def test_train_or_eval_mode_stays_and_an_engine_can_look_in_between():
    hf = families.FAMILIES["llama"]().train()
    model = models.trainable(hf)
    assert hf.training
    item = Example(GRAPH, QUESTIONS), Block()
    (packed,) = pack([item], LONG)
    optimizer = torch.optim.SGD(hf.parameters(), 0.01)
    for _ in range(2):
        loss(logits(model, packed), packed).backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            found = logits(model, packed).log_softmax(-1).gather(1, packed.targets[:, None])[:, 0]
        engine = Engine(models.wrap(hf), kv_budget=1 << 26)
        expected = torch.cat([engine.score(GRAPH.with_query(q), a, item[1]).scores for q, a in QUESTIONS])
        assert (found - expected).abs().max() <= 1e-4


# adapters and link tokens


def test_lora_through_peft():
    from peft import LoraConfig, get_peft_model

    hf = families.FAMILIES["llama"]()
    model = models.trainable(hf)
    before = {name: p.clone() for name, p in hf.named_parameters()}
    adapted = get_peft_model(hf, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    (packed,) = pack([(Example(GRAPH, QUESTIONS), Block())], LONG)
    called = []
    adapted.register_forward_hook(lambda *args: called.append(args))
    value = loss(logits(model, packed, module=adapted), packed)
    assert len(called) == 1
    assert torch.equal(value, loss(logits(model, packed), packed))
    assert all("lora" in name for name in gradients(adapted, value))
    merged = adapted.merge_and_unload()
    assert any(not torch.equal(p, before[name]) for name, p in merged.named_parameters())
    assert (loss(logits(model, packed), packed) - value).abs() <= 1e-5


@pytest.mark.parametrize("tied", [False, True])
def test_only_the_rows_of_link_tokens_change(tmp_path, tied):
    hf = families.build("Llama", tie_word_embeddings=tied)
    method = add_link_tokens(hf, links=2, slots=4)
    assert method == KVLink(2, VOCAB, 4, VOCAB + 8, VOCAB + 9)
    before = {name: p.detach().clone() for name, p in hf.named_parameters()}
    model, trained = models.trainable(hf), train_only_rows(hf, method)
    optimizer = torch.optim.AdamW([p for p in trained.parameters() if p.requires_grad], lr=0.05, weight_decay=0.1)
    sequences = pack([(Example(GRAPH, QUESTIONS), method)], LONG)
    history = []
    for _ in range(4):
        value = packed_loss(model, sequences)
        history.append(float(value.detach()))
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert history[-1] < history[0]
    trained.merge_and_unload()
    changed = {name: p for name, p in hf.named_parameters() if not torch.equal(p, before[name])}
    assert list(changed) == ["model.embed_tokens.weight"]
    rows = (changed["model.embed_tokens.weight"] != before["model.embed_tokens.weight"]).any(-1)
    assert rows.nonzero().flatten().tolist() == rows_of(method)

    hf.save_pretrained(tmp_path)
    engine = Engine(models.load(tmp_path), kv_budget=1 << 26)
    expected = torch.cat([engine.score(GRAPH.with_query(q), a, method).scores for q, a in QUESTIONS])
    with torch.no_grad():
        found = logits(model, sequences[0]).log_softmax(-1).gather(1, sequences[0].targets[:, None])[:, 0]
    assert (found - expected).abs().max() <= 1e-4


def test_rows_of_a_method():
    assert rows_of(KVLink(1, 128011, 2, 128254, 128255)) == [128011, 128012, 128254, 128255]
    assert rows_of(KVLink(2, 0, 1)) == [0, 1]
    with pytest.raises(GraphError, match="kvlink has no tokens of its own"):
        rows_of(KVLink())


def test_the_examples_in_the_documentation_run():
    text = (Path(__file__).parents[2] / "docs" / "reference" / "training.md").read_text(encoding="utf-8")
    blocks = [block.split("```")[0] for block in text.split("```python\n")[1:]]
    about_models = [block for block in blocks if "hf" in block]  # not those that start a run
    assert len(about_models) == 2
    for block in about_models:
        hf = families.FAMILIES["llama"]()
        before = hf.lm_head.weight.detach().clone()
        names: dict = {"hf": hf}
        exec(block, names)
        if "optimizer" in names:
            assert not torch.equal(hf.lm_head.weight, before)
        else:
            assert [name for name, p in names["trained"].named_parameters() if p.requires_grad]
