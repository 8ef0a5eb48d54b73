"""The synthetic world: solved by symbols alone, with every control, its tokenizer, and through an evaluation.

The solvers here read the text as a model would; what they use besides (edges, order, prefixes) is what a test is about.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import transformers
from safetensors.torch import save_file

from families import build
from kvgraph import methods
from kvgraph.cli import main
from kvgraph.data.chat import opening
from kvgraph.data.items import read
from kvgraph.data.tasks.world import WORLD_CHUNKS, WORLD_HOPS
from kvgraph.data.world import names, tokenizer, world
from kvgraph.data.world.names import Dealer, NamesError
from kvgraph.data.world.world import Corpus, World, WorldError
from kvgraph.eval import ablate, stats
from kvgraph.eval.runs import Run

ROOT = Path(__file__).parents[2]
HOPS = World("hops", count=150)
CHUNKS = World("chunks", count=150)
SHUFFLED = replace(CHUNKS, order="shuffled", questions=99)

Stated = list[tuple[str, str, str]]  # (subject, relation, value)

SENTENCE = re.compile(r"(?P<subject>[A-Z]\w*(?: firm| city)?) (?P<relation>[a-z]+) (?P<value>\w+)\.")


# -- solvers ----------------------------------------------------------------------------------------------------------


def stated(text: str) -> Stated:
    """What a segment states, without "is a person" and without its prefix; "She" is a subject like any other."""
    text = text.split(": ")[-1]
    return [tuple(match.groups()) for match in SENTENCE.finditer(re.sub(r"\w+ is a \w+\.", "", text))]


def named(text: str) -> str | None:
    """The entity that a chunk names: "Romi is a person."."""
    match = re.search(r"(\w+) is a ", text)
    return match and match[1]


def look_up(facts: Stated, subject: str, relation: str) -> str | None:
    """The value that is stated, if it is one."""
    found = {value for s, r, value in facts if (s, r) == (subject, relation)}
    return found.pop() if len(found) == 1 else None


def solve_hops(texts: Iterable[str], question: str) -> str | None:
    """The answer by following the question's relations through what the texts state."""
    facts = [fact for text in texts for fact in stated(text)]
    if match := re.fullmatch(r"Who is earlier, (\w+) dates or (\w+) dates\?", question):
        years = {name: look_up(facts, name, "dates") for name in match.groups()}
        return None if None in years.values() else min(years, key=lambda name: int(years[name]))
    subject, *path = question.replace(" what", "").split()
    for relation in path:
        subject = look_up(facts, subject, relation)
    return subject


def solve_chunks(about: Mapping[int, str | None], texts: list[str], question: str) -> str | None:
    """The answer, given whom each chunk is about."""
    facts = [(about[i], relation, value) for i, text in enumerate(texts) for _, relation, value in stated(text)]
    return look_up(facts, *question.split())


def by_edges(corpus: Corpus) -> dict[int, str | None]:
    """A chunk is about whom it names, or else whom a chunk names that it has an edge with, in either direction."""
    about = {i: named(s.text) for i, s in enumerate(corpus.segments)}
    own = dict(about)
    for one, other in corpus.edges:
        for i, j in ((one, other), (other, one)):
            if own[i] is None:
                about[i] = about[i] or own[j]
    return about


def by_order(corpus: Corpus) -> dict[int, str | None]:
    """A chunk is about who was named last."""
    last, about = None, {}
    for i, segment in enumerate(corpus.segments):
        last = about[i] = named(segment.text) or last
    return about


def by_name(corpus: Corpus) -> dict[int, str | None]:
    """A chunk is about whom its prefix names."""
    return {i: segment.text.split(": ")[0] for i, segment in enumerate(corpus.segments)}


def by_id(corpus: Corpus) -> dict[int, str | None]:
    """A chunk is about whom a chunk with the same prefix names."""
    texts = [segment.text for segment in corpus.segments]
    of = {text.split(": ")[0]: named(text) for text in texts if named(text)}
    return {i: of.get(text.split(": ")[0]) for i, text in enumerate(texts)}


def accuracy(made: Iterable[Corpus], about: Callable[[Corpus], Mapping[int, str | None]]) -> float:
    """The share of all questions that the solver gets right, given whom it takes chunks to be about."""
    hits = []
    for corpus in made:
        knows, texts = about(corpus), [segment.text for segment in corpus.segments]
        hits += [solve_chunks(knows, texts, q.text) == q.answer for q in corpus.questions]
    return sum(hits) / len(hits)


# -- what is asked can be answered ------------------------------------------------------------------------------------


def test_every_hops_question_has_one_answer_in_the_text():
    kinds = Counter()
    for corpus in HOPS:
        texts = [segment.text for segment in corpus.segments]
        for question in corpus.questions:
            assert solve_hops(texts, question.text) == question.answer, f"{corpus}\n{question}"
            kinds[question.kind] += 1
    assert min(kinds[kind] for kind in ("1-hop", "2-hop", "3-hop", "comparison")) > 100


def test_it_takes_all_gold_documents_and_no_other():
    for corpus in World("hops", count=40):
        for question in corpus.questions:
            gold = {i: corpus.segments[i].text for i in question.gold}
            assert solve_hops(gold.values(), question.text) == question.answer
            assert question.kind == "comparison" or len(gold) == int(question.kind[0])
            for left_out in gold:
                assert solve_hops([t for i, t in gold.items() if i != left_out], question.text) is None


@pytest.mark.parametrize(
    ("settings", "about"),
    [
        ({"order": "kept"}, by_order),
        ({"order": "kept"}, by_edges),
        ({"order": "shuffled"}, by_edges),
        ({"order": "shuffled", "edges": "reversed"}, by_edges),
        ({"order": "sorted"}, by_order),
        ({"order": "sorted", "edges": "reversed"}, by_order),
        ({"order": "shuffled", "prefix": "name"}, by_name),
        ({"order": "shuffled", "prefix": "id"}, by_id),
    ],
)
def test_chunks_are_solved_by_order_edges_or_prefix(settings, about):
    made = list(replace(CHUNKS, **settings))
    assert accuracy(made, about) == 1
    assert {q.kind for corpus in made for q in corpus.questions} == {"named", "pronoun"}


def test_without_its_structure_a_shuffled_corpus_is_guessed_at_the_floor():
    """Whatever a guesser goes by: the first or last chunk that states the relation, the nearest one, who was named."""

    def guesses(corpus: Corpus, question: world.WorldQuestion) -> dict[str, bool]:
        _, relation = question.text.split()
        values = {i: v for i, s in enumerate(corpus.segments) for _, r, v in stated(s.text) if r == relation}
        here = question.gold[0]
        guessed = {
            "first": values[min(values)],
            "last": values[max(values)],
            "nearest": values[min(values, key=lambda i: (abs(i - here), i))],
            "next": values[min(values, key=lambda i: (i < here, i))],
            "longest": values[max(values, key=lambda i: len(stated(corpus.segments[i].text)))],
        }
        return {name: value == question.answer for name, value in guessed.items()}

    asked = [(c, q) for c in replace(SHUFFLED, count=400) for q in c.questions if q.kind == "pronoun"]
    floor = sum(q.floor for _, q in asked) / len(asked)
    hits = Counter()
    for corpus, question in asked:
        hits.update(name for name, hit in guesses(corpus, question).items() if hit)
    error = math.sqrt(floor * (1 - floor) / len(asked))  # the questions of a corpus share at most one guess a relation
    assert len(asked) > 3000 and 0.15 < floor < 0.25
    for name, count in hits.items():
        assert abs(count / len(asked) - floor) < 4 * error, name


@pytest.mark.parametrize("made", [HOPS, SHUFFLED])
def test_the_floor_is_that_of_a_guess_among_all_statements_of_the_relation(made):
    for corpus in replace(made, count=60):
        facts = [fact for segment in corpus.segments for fact in stated(segment.text)]
        for question in corpus.questions:
            if question.kind == "comparison":
                candidates = re.findall(r"[A-Z]\w+", question.text)[1:]
            else:
                candidates = [value for _, relation, value in facts if relation == question.text.split()[-1]]
            hits = [candidate == question.answer for candidate in candidates]
            assert sum(hits) / len(hits) == question.floor < 1


# -- controls ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["hops", "chunks"])
@pytest.mark.parametrize("share", [1.0, 0.5, 0.3])
@pytest.mark.parametrize("change", ["dropped", "random", "wrong", "reversed"])
def test_a_control_changes_so_many_edges_and_nothing_else(kind, change, share):
    true = World(kind, count=30)
    for before, after in zip(true, replace(true, edges=change, share=share), strict=True):
        assert after.segments == before.segments
        assert [q._replace(edges_say="") for q in after.questions] == [
            q._replace(edges_say="") for q in before.questions
        ]
        old, new = set(before.edges), set(after.edges)
        changed = round(share * len(old))
        assert len(old - new) == changed and len(new) == len(after.edges)
        assert len(new) == len(old) - (changed if change == "dropped" else 0)
        segments = after.segments
        if change == "reversed":
            assert {(r, s) for s, r in new - old} == old - new
        if change == "random":
            assert Counter(r for _, r in new) == Counter(r for _, r in old)
            assert all(s != r for s, r in new)
        if change == "wrong":
            assert Counter(r for _, r in new) == Counter(r for _, r in old)
            told = {segments[r].entity: segments[s].entity for s, r in new - old if kind == "chunks"}
            assert all(own != other for own, other in told.items())
            assert all(segments[s].named for s, _ in new)
            kinds = [
                {r: Counter(segments[s].kind for s, to in edges if to == r) for _, r in old} for edges in (old, new)
            ]
            assert kinds[0] == kinds[1]


def test_random_edges_come_from_everywhere():
    edges = [(c, e) for c in replace(SHUFFLED, edges="random") for e in c.edges]
    chances = [(len(c.segments) - 2, sum(s.named for s in c.segments) - 1) for c, _ in edges]
    expected = sum(naming / among for among, naming in chances) / len(edges)
    found = sum(c.segments[source].named for c, (source, _) in edges) / len(edges)
    assert found == pytest.approx(expected, abs=4 * math.sqrt(0.25 / len(edges)))


def test_edges_of_chunks_go_from_the_naming_chunk_to_all_later_ones_of_its_document():
    for corpus in replace(SHUFFLED, count=30):
        for reader, segment in enumerate(corpus.segments):
            sources = [corpus.segments[s] for s, r in corpus.edges if r == reader]
            if segment.named:
                assert not sources
            else:
                assert [(s.entity, s.named) for s in sources] == [(segment.entity, True)]


def test_edges_of_hops_go_from_the_mentioned_document_to_the_mentioning_one():
    for corpus in replace(HOPS, count=30):
        home = {segment.text.split()[0]: i for i, segment in enumerate(corpus.segments)}
        mentions = {
            (home[word], i)
            for i, segment in enumerate(corpus.segments)
            for word in re.findall(r"\w+", segment.text)
            if word in home and home[word] != i
        }
        assert set(corpus.edges) == mentions


@pytest.mark.parametrize(("edges", "share"), [("true", 1.0), ("wrong", 1.0), ("wrong", 0.5), ("random", 1.0)])
def test_what_the_edges_say_is_what_a_solver_reads_from_them(edges, share):
    said = right = count = 0
    for corpus in replace(SHUFFLED, edges=edges, share=share):
        about, texts = by_edges(corpus), [segment.text for segment in corpus.segments]
        for question in corpus.questions:
            if question.kind == "pronoun":
                assert (solve_chunks(about, texts, question.text) or "") == question.edges_say
                count, said, right = (
                    count + 1,
                    said + bool(question.edges_say),
                    right + (question.edges_say == question.answer),
                )
    if edges == "true":
        assert right == said == count
    elif (edges, share) == ("wrong", 1.0):
        assert right == 0 and said > 0.5 * count
    elif edges == "random":  # never from where it was
        assert right == 0 < said < count
    else:
        assert 0 < right < said < count


@pytest.mark.parametrize("settings", [{"prefix": "name"}, {"prefix": "id"}, {"order": "sorted"}])
def test_text_can_say_only_what_the_edges_say(settings):
    about = {"name": by_name, "id": by_id}.get(settings.get("prefix"), by_order)
    wrong = replace(SHUFFLED, edges="wrong", count=30, types=("pronoun",))
    assert accuracy(replace(wrong, **settings), about) == 0
    for corpus in replace(SHUFFLED, edges="dropped", count=30, **settings):
        later = [i for i, segment in enumerate(corpus.segments) if not segment.named]
        if "prefix" in settings:
            assert all((": " in s.text) == s.named for s in corpus.segments)
        else:
            assert later == list(range(len(corpus.segments) - len(later), len(corpus.segments)))


# -- settings ---------------------------------------------------------------------------------------------------------


def test_a_corpus_depends_on_seed_and_number_alone():
    made = [*HOPS, *CHUNKS]
    assert made == [*HOPS, *CHUNKS]
    assert HOPS.corpus(17) == made[17] and CHUNKS.corpus(0) == made[HOPS.count]
    assert len({str(corpus).split("\n", 1)[1] for corpus in made}) == len(made)
    assert HOPS.corpus(0) != replace(HOPS, seed=1).corpus(0)


@pytest.mark.parametrize(
    ("kind", "settings", "digest"),
    [
        ("hops", "count=20", "88b93460975b7726"),
        (
            "chunks",
            "count=20,order=shuffled,edges=random,share=0.5,prefix=id,split=train",
            "67388e6c2ea67b1c",
        ),
    ],
)
def test_a_seed_gives_the_same_records_everywhere(kind, settings, digest):
    """If this fails without a change to the world, published numbers can't be made again."""
    lines = (json.dumps(record) for record in world.records(World.parse(kind, settings)))
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16] == digest


def test_how_a_corpus_is_told_leaves_its_questions_alone():
    plain = World("chunks", count=20)
    told = [
        {"order": "shuffled"},
        {"order": "sorted", "edges": "wrong"},
        {"prefix": "id", "edges": "dropped", "share": 0.5},
    ]
    for settings in told:
        for before, after in zip(plain, replace(plain, **settings), strict=True):
            assert after.id == before.id and after.segments != before.segments
            assert [(q.kind, q.text, q.answer) for q in after.questions] == [
                (q.kind, q.text, q.answer) for q in before.questions
            ]


def test_sizes_types_and_numbers_of_questions():
    for corpus in World("hops", entities=(2, 6), count=60):
        assert 6 <= len(corpus.segments) <= 18 and len(corpus.questions) == 8
    sizes = {len(corpus.segments) for corpus in CHUNKS}
    assert min(sizes) >= 10 and max(sizes) <= 18 and len(sizes) > 5
    for corpus in World("hops", entities=(3, 3), types=("2-hop", "2-hop", "1-hop"), questions=999, count=5):
        assert len(corpus.segments) == 9
        assert len({q.text for q in corpus.questions}) == len(corpus.questions) == 3 * 7 + 3 * (2 + 2 + 2)
    drawn = Counter(
        q.kind for c in World("hops", types=("2-hop", "2-hop", "1-hop"), questions=3, count=200) for q in c.questions
    )
    assert drawn["2-hop"] / drawn.total() == pytest.approx(2 / 3, abs=0.08) and set(drawn) == {"1-hop", "2-hop"}


@pytest.mark.parametrize("statements", [1, 2])
def test_chunks_are_cut_where_they_would_state_too_much(statements):
    """The same facts and questions, in more chunks."""
    for whole, cut in zip(World("chunks", count=40), World("chunks", count=40, statements=statements), strict=True):
        assert max(len(s.relations) for s in cut.segments) == statements
        assert max(len(s.relations) for s in whole.segments) > statements or len(whole.segments) == len(cut.segments)
        told = [sorted((s.entity, r) for s in c.segments for r in s.relations) for c in (whole, cut)]
        assert told[0] == told[1]
        assert [(q.text, q.answer) for q in whole.questions] == [(q.text, q.answer) for q in cut.questions]


def test_settings_as_text():
    text = "seed=3,count=7,entities=4-5,questions=2,types=named+pronoun,order=shuffled,edges=wrong,share=0.5,prefix=id,statements=2,split=train"
    assert World.parse("chunks", text) == World(
        "chunks", "train", 3, 7, (4, 5), 2, ("named", "pronoun"), "shuffled", "wrong", 0.5, "id", 2
    )
    assert World.parse("hops", "entities=3") == World("hops", entities=(3, 3))
    assert World.parse("hops") == World()


@pytest.mark.parametrize(
    ("kind", "settings", "says"),
    [
        ("chunk", "", "kind is 'chunk'; there are hops, chunks"),
        ("hops", "colour=red", "'colour=red' isn't a setting; give NAME=VALUE with one of split, seed"),
        ("hops", "seed", "'seed' isn't a setting"),
        ("hops", "seed=x", "seed is 'x', which isn't a number"),
        ("hops", "entities=1-2", "entities is 1-2"),
        ("hops", "entities=4-2", "entities is 4-2"),
        ("hops", "entities=8", "at most 7 entities of a kind"),
        ("hops", "questions=0", "questions is 0; it must be at least 1"),
        ("hops", "order=shuffled", "order and prefix are for chunks"),
        ("hops", "prefix=id", "order and prefix are for chunks"),
        ("hops", "types=pronoun", "types is 'pronoun'; there are 1-hop"),
        ("chunks", "edges=upside-down", "edges is 'upside-down'; there are true, dropped"),
        ("chunks", "share=0.5", "share is 0.5"),
        ("chunks", "edges=wrong,share=nan", "share is nan"),
    ],
)
def test_a_setting_that_does_not_exist_is_one_clear_line(kind, settings, says):
    with pytest.raises(WorldError) as error:
        World.parse(kind, settings)
    assert says in str(error.value) and "\n" not in str(error.value)


# -- names and tokens -------------------------------------------------------------------------------------------------


def test_held_out_names_are_other_names_of_the_same_syllables():
    train, held_out = (set(names.names(split)) for split in ("train", "held-out"))
    assert not train & held_out and len(held_out) * 3 == len(train) == 2700
    for half in (train, held_out):
        assert {name[: -len(second)] for name in half for second in names.SECOND if name.endswith(second)} >= set(
            names.FIRST
        )
    assert not {name.lower() for name in train | held_out} & set(map(str.lower, world.words()))


@pytest.mark.parametrize("split", ["train", "held-out"])
def test_a_corpus_has_names_of_its_half_and_no_syllable_twice(split):
    known = set(names.names(split))
    pieces = {name: name for name in known}
    encode = tokenizer.build().encode
    for made in (World("hops", split, count=40, entities=(7, 7)), World("chunks", split, count=40, entities=(9, 9))):
        for corpus in made:
            words = {w for s in corpus.segments for w in re.findall(r"\w+", s.text)} - set(world.words())
            assert words <= pieces.keys()
            syllables = [token for word in words for token in encode(word, add_special_tokens=False).tokens]
            assert len(syllables) == len(set(syllables)) == 2 * len(words)


@pytest.mark.parametrize("split", ["train", "held-out"])
def test_the_dealer_never_runs_dry_before_it_says_so(split):
    for seed in range(300):
        dealer = Dealer(split)
        assert len(set(dealer.deal(random.Random(seed), names.MOST))) == names.MOST
        with pytest.raises(NamesError, match="syllables for only 45 names"):
            dealer.deal(random.Random(seed), 1)


def test_every_text_is_in_the_vocabulary_and_comes_back():
    made = tokenizer.build()
    unknown = made.token_to_id(tokenizer.UNKNOWN)
    worlds = [HOPS, SHUFFLED, replace(SHUFFLED, prefix="id"), replace(SHUFFLED, prefix="name")]
    used = set()
    for settings in worlds:
        for corpus in replace(settings, split="train", count=300):
            texts = [s.text for s in corpus.segments] + [t for q in corpus.questions for t in (q.text, q.answer)]
            for text, encoded in zip(texts, made.encode_batch(texts, add_special_tokens=False), strict=True):
                assert unknown not in encoded.ids and made.decode(encoded.ids) == text
                used.update(encoded.tokens)
    special = {*tokenizer.SPECIAL, *(f"<link_{i}>" for i in range(tokenizer.LINKS))}
    assert used == set(tokenizer.vocabulary()) - special, "a token that no training text has"
    for name in names.names("train") + names.names("held-out"):
        assert len(made.encode(name, add_special_tokens=False).ids) == 2


def test_the_tokenizer_file_is_always_the_same_and_loads_as_any_other(tmp_path):
    for folder in (tmp_path / "a", tmp_path / "b"):
        tokenizer.write(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "a")
    assert len(loaded) == len(tokenizer.vocabulary()) < 350
    assert (loaded.bos_token, loaded.eos_token, loaded.pad_token) == (tokenizer.BOS, tokenizer.EOS, tokenizer.PAD)
    assert opening(loaded) == (loaded.bos_token_id,)
    assert loaded.encode("<bos>\n\n", add_special_tokens=False) == [loaded.bos_token_id]
    ids = loaded.encode("d3: Romi is a person.\n", add_special_tokens=False)
    assert loaded.decode(ids) == "d3: Romi is a person."
    assert len(ids) == 8


@pytest.mark.parametrize("links", [1, 4, 5])
def test_kvlinks_tokens_are_the_tokenizers(links):
    method = methods.parse(tokenizer.kvlink(links))
    made = tokenizer.build()
    assert (method.links, method.slots) == (links, tokenizer.LINKS // links)
    ids = range(method.link_start, method.link_start + links * method.slots)
    assert all(made.id_to_token(id).startswith("<link_") for id in ids)
    assert [made.id_to_token(id) for id in (method.mem_start, method.mem_end)] == ["<mem_start>", "<mem_end>"]


# -- through an evaluation --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A tiny random Llama that speaks the world's language."""
    folder = tmp_path_factory.mktemp("model")
    made = build("Llama", vocab_size=len(tokenizer.vocabulary()), max_position_embeddings=2048)
    made.config.save_pretrained(folder)
    save_file(
        {name: value.contiguous() for name, value in made.state_dict().items()},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    tokenizer.write(folder)
    return folder


def command(capsys, *words: object) -> str:
    """Standard output of a command that must succeed."""
    with pytest.raises(SystemExit) as exit_:
        main([str(word) for word in words])
    out = capsys.readouterr()
    assert not exit_.value.code, out.err
    return out.out


@pytest.mark.parametrize("kind", ["hops", "chunks"])
def test_a_file_of_records_gives_the_items_that_are_generated(kind, tmp_path, capsys):
    task = {"hops": WORLD_HOPS, "chunks": WORLD_CHUNKS}[kind]
    settings = "questions=3,edges=random,share=0.5"
    path = tmp_path / "world.jsonl"
    said = command(
        capsys, "data", "world", "--kind", kind, "--count", 5, "--seed", 2, "--settings", settings, "--out", path
    )
    assert said == f"15 questions over 5 corpora are in {path}\n"
    written = read(task, path)
    generated = read(task, f"generated:{settings},seed=2,count=5")
    assert written.items == generated.items and written.sha256 == generated.sha256
    first, corpus = written.items[0], World.parse(kind, f"{settings},seed=2").corpus(0)
    assert first.references == (corpus.questions[0].answer,) and first.links == corpus.edges
    assert [document.text for document in first.documents] == [segment.text for segment in corpus.segments]
    assert first.facts["floor"] == corpus.questions[0].floor and first.facts["edges"] == "random 0.5"
    assert {item.cluster for item in written.items} == {f"{kind}-held-out-2-{i}" for i in range(5)}
    assert {document.id for document in first.documents} == {f"{corpus.id}/{name}" for name in _names(corpus)}


def _names(corpus: Corpus) -> list[str]:
    parts: Counter[str] = Counter()
    out = []
    for segment in corpus.segments:  # kept in order, so parts count up
        out.append(segment.entity + (f".{parts[segment.entity]}" if corpus.id.startswith("chunks") else ""))
        parts[segment.entity] += 1
    return out


def test_the_hub_stands_for_the_generated_default():
    found = read(WORLD_HOPS, "hub", limit=3)
    assert (found.source, found.items) == ("generated", read(WORLD_HOPS, "generated").items[:3])
    with pytest.raises(WorldError, match="colour"):
        read(WORLD_HOPS, "generated:colour=red")


def test_an_evaluation_gives_the_world_edges_and_clusters(model, tmp_path, capsys):
    words = [
        "eval",
        "--task",
        "world-chunks",
        "--method",
        "graph-kv",
        "--method",
        tokenizer.kvlink(4),
        "--model",
        model,
    ]
    command(capsys, *words, "--data", "generated:order=shuffled,questions=4,count=6", "--out", tmp_path, "--no-check")
    run = Run.load(tmp_path / "world-chunks" / "graph-kv")
    made = World.parse("chunks", "order=shuffled,questions=4,count=6")
    assert [line["edges"] for line in run.results[::4]] == [[list(edge) for edge in c.edges] for c in made]
    assert [line["cluster"] for line in run.results[::4]] == [corpus.id for corpus in made]
    assert set(run.summary["by"]) == {"kind", "order", "edges", "prefix"}
    scores = [line["scores"]["em"] for line in run.results]
    clusters = stats.clusters_of(run.results)
    assert len(set(clusters)) == 6
    assert run.summary["scores"]["em"] == stats.mean_interval(scores, clusters)._asdict()
    (kvlink,) = (folder for folder in (tmp_path / "world-chunks").iterdir() if folder.name.startswith("kvlink"))
    assert Run.load(kvlink).errors == run.errors == 0


def test_a_gold_answer_scores_and_what_follows_it_does_not_count():
    from kvgraph.eval.metrics import METRICS

    assert WORLD_HOPS.metrics[0] == "em" and "." in WORLD_HOPS.stop
    assert METRICS["em"]("Brepu", ("Brepu",)) == 1 and METRICS["em"]("Brepu Kalo", ("Brepu",)) == 0


def test_ablations_keep_the_gold_segments():
    items = read(WORLD_CHUNKS, "generated:order=shuffled,count=5").items
    base = ablate.Variant("base", "", methods.parse("graph-kv"), items, "links")
    made = {
        variant.name: variant for variant in ablate.variants(base, ["distractors", "random-edges", "reversed-edges"])[0]
    }
    for before, after in zip(items, made["distractors-0"].items, strict=True):
        assert len(after.documents) == len(before.facts["gold_positions"].split(","))
        assert any(before.references[0] in document.text for document in after.documents)
        assert after.cluster == before.cluster
    assert all(len(a.links) == len(b.links) for a, b in zip(items, made["random-edges"].items, strict=True))


def test_the_arrangements_of_one_question_are_a_cluster():
    from kvgraph.data.chat import Document
    from kvgraph.data.tasks.ego import Ego, arranged

    egos = [Ego(f"q{i}", "?", ("yes",), (Document(f"paper {i}"),), ()) for i in range(3)]
    lines = [
        {"id": item.id, "cluster": item.cluster, "documents": [d.text for d in item.documents]}
        for item in arranged(egos)
    ]
    assert len(lines) == 15
    assert Counter(stats.clusters_of(lines)) == {("cluster", f"q{i}"): 5 for i in range(3)}


# -- for people -------------------------------------------------------------------------------------------------------


def test_the_documentation_shows_what_its_commands_print(capsys):
    text = (ROOT / "docs" / "reference" / "world.md").read_text(encoding="utf-8")
    shown = re.findall(r"^    \$ kvgraph (.+)\n((?:(?:    .*)?\n)+)", text, re.M)
    assert len(shown) == 2
    for words, expected in shown:
        lines = [line.removeprefix("    ") for line in expected.rstrip("\n").split("\n")]
        assert command(capsys, *words.split()).rstrip("\n").split("\n") == lines


def test_the_documentation_names_every_setting():
    rows = re.findall(
        r"^\| (`[^|]*`) \|",
        (ROOT / "docs" / "reference" / "world.md").read_text().split("## Settings")[1].split("\n## ")[0],
        re.M,
    )
    named_there = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert named_there == set(asdict(World())) - {"kind"}


def test_a_file_that_cannot_be_written_is_one_clear_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["data", "world", "--out", str(tmp_path / "no" / "file.jsonl")])
    assert (
        exit_.value.code == 1
        and capsys.readouterr().err == f"kvgraph: {tmp_path}/no/file.jsonl: No such file or directory\n"
    )


def test_the_world_needs_no_torch():
    program = "import sys, kvgraph.data.world.world; print({'torch', 'tokenizers', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == "set()\n"


def test_the_tokenizer_of_a_model_is_not_replaced(tmp_path, capsys):
    """Other commands read the folder that `--tokenizer` names."""
    with pytest.raises(SystemExit, match="0"):
        main(["data", "world", "--tokenizer", str(tmp_path / "new")])
    assert (tmp_path / "new" / "tokenizer_config.json").is_file()
    (tmp_path / "tokenizer.json").write_text("a model's")
    with pytest.raises(SystemExit, match="2"):
        main(["data", "world", "--tokenizer", str(tmp_path)])
    assert f"{tmp_path} has a tokenizer; give a folder without one" in capsys.readouterr().err
    assert (tmp_path / "tokenizer.json").read_text() == "a model's"
