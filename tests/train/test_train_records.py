"""Training records become the tokens that evaluation and server would give the model, and what is learned is the answer."""

from __future__ import annotations

import json
import os
import random
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from families import build
from kvgraph import Engine, demo, methods
from kvgraph.data import io, prompt, tasks
from kvgraph.data.chat import Document, chat
from kvgraph.data.task import Item
from kvgraph.models import load_tokenizer, trainable, wrap
from kvgraph.train.forward import logits, loss
from kvgraph.train.pack import pack
from kvgraph.train.records import RecordError, Records, example

DATA = Path(os.environ.get("KVGRAPH_DATA", Path(__file__).parents[2] / ".." / "shared" / "data")).resolve()
VOCABULARY = DATA / "gpt2_tokenizer"

HEADERS = (  # one special token ends a turn, and texts are stripped
    "{{ bos_token }}{% for m in messages %}<|head|>{{ m.role }}<|body|>\n\n{{ m.content | trim }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|head|>assistant<|body|>\n\n{% endif %}"
)
LINES = (  # a line end after the end of a turn, which the model doesn't say
    "{% for m in messages %}<|head|>{{ m.role }}\n{{ m.content }}<|eot|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|head|>assistant\n{% endif %}"
)
THINKING = (  # the last answer gets an empty thought, which an open question doesn't have yet
    "{% for m in messages %}<|head|>{{ m.role }}\n{% if loop.last and m.role == 'assistant' %}<|body|>\n\n<|body|>\n\n"
    "{% endif %}{{ m.content }}<|eot|>\n{% endfor %}{% if add_generation_prompt %}<|head|>assistant\n{% endif %}"
)
CHATS = {"headers": HEADERS, "lines": LINES, "thinking": THINKING, "words": demo.CHAT_TEMPLATE}
ENDS = {"headers": "<|eot|>", "lines": "<|eot|>", "thinking": "<|eot|>", "words": "<|end|>"}

EXCHANGES = [
    {"role": "user", "content": "Who dug it?"},
    {"role": "assistant", "content": "The guild."},
    {"role": "user", "content": "When?"},
    {"role": "assistant", "content": "In 1731."},
]
DOCUMENTS = [{"title": "Port Ansel", "text": "It was dug by the guild."}, {"title": "The guild", "text": "Salt."}]
TASK = {"id": "t", "task": "hotpotqa", "question": "Who dug it?", "documents": DOCUMENTS, "answer": "the guild"}


def tokenizer(template: str | None = None, *, bos: bool = False) -> PreTrainedTokenizerFast:
    """One token a byte, and some special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(BPE({symbol: i for i, symbol in enumerate(alphabet)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<|begin|>", "<|end|>", "<|head|>", "<|body|>", "<|eot|>"])
    if bos:
        made.post_processor = processors.TemplateProcessing("<|begin|> $A", None, [("<|begin|>", 256)])
    found = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<|begin|>", eos_token="<|end|>")
    found.chat_template = template
    return found


def learned(made, using) -> str:
    """The text of the tokens that are learned, runs of them between bars."""
    (question,) = made.questions
    flags = question.learned or (True,) * len(question.answer)
    runs, last = [], False
    for token, flag in zip(question.answer, flags, strict=True):
        if flag and not last:
            runs.append([])
        if flag:
            runs[-1].append(token)
        last = flag
    return "|".join(using.decode(run) for run in runs)


def whole(made) -> list[int]:
    """All tokens of an example in order."""
    (question,) = made.questions
    return [t for piece in (*made.graph.prefix, *made.graph.segments, *question[:2]) for t in piece]


@pytest.fixture(scope="module")
def gpt2():
    if not VOCABULARY.is_dir():
        pytest.skip(f"{VOCABULARY} is missing; set KVGRAPH_DATA to the folder that has gpt2_tokenizer")
    vocabulary = json.loads((VOCABULARY / "gpt2.encoder.json").read_text(encoding="utf-8"))
    lines = (VOCABULARY / "gpt2.vocab.bpe").read_text(encoding="utf-8").split("\n")
    made = Tokenizer(models.BPE(vocabulary, [tuple(line.split(" ")) for line in lines[1:] if line]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|endoftext|>")


# -- texts ------------------------------------------------------------------------------------------------------------


def test_a_text_is_learned_from_bos_on_and_goes_on_from_its_documents():
    using = tokenizer(bos=True)
    plain = example({"id": "a", "text": "abc"}, using)
    assert plain.graph.segments == () and plain.questions[0] == ((256,), tuple(using.encode("abc")[1:]), ())
    after = example({"id": "a", "text": "c", "documents": ["a", "bé"]}, using)
    assert after is None  # there is no token to learn "c" from
    after = example({"id": "a", "text": "cd", "documents": ["a", "bé"]}, using)
    assert [using.decode(piece) for piece in after.graph.segments] == ["a", "bé"]
    assert after.graph.prefix == ((256,),) and learned(after, using) == "cd"


def test_a_long_text_is_cut_and_everything_else_is_left_out():
    using = tokenizer(CHATS["lines"], bos=True)
    assert len(whole(example({"text": "x" * 500}, using, max_tokens=64))) == 64
    cut = example({"text": "x" * 500, "documents": ["d" * 40]}, using, max_tokens=64)
    assert len(whole(cut)) == 64 and len(cut.graph.segments[0]) == 40
    assert example({"text": "x" * 500, "documents": ["d" * 63]}, using, max_tokens=64) is None
    for record in (TASK, {"messages": EXCHANGES}):
        size = len(whole(example(record, using)))
        assert len(whole(example(record, using, max_tokens=size))) == size
        assert example(record, using, max_tokens=size - 1) is None


# -- conversations ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CHATS)
def test_a_conversation_is_what_the_server_makes_of_it_turn_by_turn(name):
    using = tokenizer(CHATS[name])
    made = example({"messages": EXCHANGES}, using)
    engine = Engine(wrap(build("Llama", vocab_size=len(using)), using))
    (question,) = made.questions
    for turn in (1, 3) if name != "thinking" else (1,):  # there, an answer is told otherwise once it isn't the last
        served = chat(using, EXCHANGES[:turn]).graph().tokenized(engine.tokenize)
        asked = [t for piece in (*served.prefix, served.query) for t in piece]
        assert whole(made)[: len(asked)] == asked
        if turn == 1:
            assert made.graph == served.with_query(()) and question.query == served.query
        said = whole(made)[len(asked) :]
        assert said[: len(engine.tokenize(EXCHANGES[turn]["content"]))] == engine.tokenize(EXCHANGES[turn]["content"])
    first = "The guild." + ("<|eot|>" if name != "words" else "")
    assert learned(made, using) == f"{first}|In 1731.{ENDS[name]}"


def test_what_a_template_puts_before_an_answer_is_learned_with_it():
    using = tokenizer(THINKING)
    made = example({"messages": EXCHANGES[:2]}, using)
    assert learned(made, using) == "<|body|>\n\n<|body|>\n\nThe guild.<|eot|>"
    assert using.decode(made.questions[0].query).endswith("<|head|>assistant\n")


@pytest.mark.parametrize("name", CHATS)
def test_documents_stand_before_the_question_as_they_are(name):
    using = tokenizer(CHATS[name])
    messages = [{"role": "system", "content": "Be brief."}, *EXCHANGES[:2]]
    made = example({"messages": messages, "documents": ["One.\n\n", "Two.\n\n"]}, using)
    assert [using.decode(piece) for piece in made.graph.segments] == ["One.\n\n", "Two.\n\n"]
    joined = [messages[0], {"role": "user", "content": "One.\n\nTwo.\n\nWho dug it?"}, messages[2]]
    assert using.decode(whole(made)) == using.decode(whole(example({"messages": joined}, using)))
    served = chat(using, messages[:2], [Document("One.\n\n"), Document("Two.\n\n")], template="{text}")
    assert made.questions[0].query == tuple(using.encode(served.query))


@pytest.mark.parametrize(
    ("messages", "documents"),
    [
        (EXCHANGES[:1], []),
        (EXCHANGES[1:], []),
        (EXCHANGES, ["two answers, and one is before the document"]),
        ([], []),
    ],
)
def test_conversations_that_nothing_can_be_learned_from_are_refused(messages, documents):
    with pytest.raises(RecordError, match="must begin with a question and end with the assistant's answer"):
        example({"messages": messages, "documents": documents}, tokenizer(LINES))


def test_a_record_is_of_one_kind():
    for record in ({"id": "x"}, {"id": "x", "text": "a", "messages": EXCHANGES}):
        with pytest.raises(RecordError, match="record 'x' must have one of text, messages, task"):
            example(record, tokenizer(LINES))


def test_what_a_template_strips_is_stripped():
    spaced = [EXCHANGES[0], {"role": "assistant", "content": "  The guild.\n"}]
    assert learned(example({"messages": spaced}, using := tokenizer(HEADERS)), using) == "The guild.<|eot|>"
    assert learned(example({"messages": spaced}, using := tokenizer(LINES)), using) == "  The guild.\n<|eot|>"
    made = example({"messages": spaced, "documents": ["\n One. ", "Two.\n"]}, using := tokenizer(HEADERS))
    assert [using.decode(piece) for piece in made.graph.segments] == ["\n One. ", "Two.\n"]


def test_a_template_that_changes_what_is_said_is_refused():
    for template, says in (
        (LINES.replace("m.content", "m.content | upper"), "leaves message 0 out of the prompt"),
        (
            LINES.replace("assistant\n{% endif", "assistant\nHm{% endif"),
            "renders an answered question differently",
        ),
        (None, "no chat template"),
    ):
        with pytest.raises(RecordError, match=says):
            example({"messages": EXCHANGES[:2]}, tokenizer(template))
        if template is not None:
            with pytest.raises(RecordError, match=says):
                example(TASK, tokenizer(template))


def test_a_conversation_that_the_template_refuses_is_left_out():
    fussy = "{% if messages[0].role == 'system' %}{{ raise_exception('no system messages') }}{% endif %}" + LINES
    thoughts = LINES.replace("m.content", "m.content.split('</think>')[-1]")
    system = {"role": "system", "content": "Be brief."}
    thinking = {"role": "assistant", "content": "Hm.</think>The guild."}
    assert example({"messages": [system, *EXCHANGES]}, tokenizer(fussy)) is None
    assert example({"messages": [EXCHANGES[0], thinking]}, tokenizer(thoughts)) is None
    for template in (fussy, thoughts):
        assert example({"messages": EXCHANGES}, tokenizer(template)) is not None


# -- tasks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["hotpotqa", "xsum", "multi-news", "triviaqa", "2wiki"])
@pytest.mark.parametrize("template", [None, *CHATS])
def test_a_task_is_asked_as_in_evaluation(name, template):
    using = tokenizer(CHATS[template] if template else None, bos=True)
    made = example({**TASK, "task": name, "links": [[0, 1]]}, using)
    item = Item("t", TASK["question"], (TASK["answer"],), tuple(Document(**d) for d in DOCUMENTS), links=((0, 1),))
    engine = Engine(wrap(build("Llama", vocab_size=len(using)), using))
    graph = prompt.build(tasks.get(name), item, using).graph(prompt.edges_of(item, "links"))
    answer = {None: " the guild<|end|>", "thinking": "<|body|>\n\n<|body|>\n\nthe guild<|eot|>"}
    scored = answer.get(template) or "the guild" + ENDS[template]
    tokenized = graph.tokenized(engine.tokenize)
    expected = tokenized.with_query([*tokenized.query, *engine.tokenize(scored)[:-1]])
    assert made.plans(methods.get("graph-kv")) == [engine.plan(expected, "graph-kv")]
    assert learned(made, using) == scored


def test_an_example_is_scored_as_the_engine_scores_the_item():
    using = tokenizer(HEADERS, bos=True)
    hf = build("Llama", vocab_size=len(using))
    engine = Engine(wrap(hf, using))
    item = Item("t", TASK["question"], (TASK["answer"],), tuple(Document(**d) for d in DOCUMENTS))
    graph = prompt.build(tasks.get("hotpotqa"), item, using).graph()
    made = example(TASK, using)
    for method in ("full", "block"):
        scores = engine.score(graph, "the guild<|eot|>", method).scores
        model = trainable(build("Llama", vocab_size=len(using)))
        (packed,) = pack([(made, methods.get(method))], 4096, limit=model.limit)
        assert loss(logits(model, packed), packed).item() == pytest.approx(-scores.mean().item(), abs=1e-4)


def test_words_keep_their_space_where_a_plain_prompt_ends_without_one(gpt2):
    made = example(TASK, gpt2)
    assert learned(made, gpt2) == " the guild<|endoftext|>"
    assert len(made.questions[0].answer) == 3  # " the", " guild", the end
    assert gpt2.decode(made.questions[0].query).endswith("Answer:")


# -- folders ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path) -> Path:
    """A prepared folder of texts of different lengths, as `kvgraph data prepare` leaves it."""
    rng = random.Random(0)
    lines = [json.dumps({"id": str(i), "text": f"{i} é\u2028" + "x" * rng.randrange(90)}) for i in range(500)]
    (tmp_path / "train.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "validation.jsonl").write_text("")
    (tmp_path / "prepared.json").write_text(json.dumps({"finished": True}))
    return tmp_path


def test_records_are_found_by_number(folder):
    using = tokenizer(bos=True)
    found = Records(folder, "train", using)
    assert len(found) == 500 and len(Records(folder, "validation", using)) == 0
    for i in (0, 1, 499, -1, 250):
        assert found.record(i)["id"] == str(i % 500)
        assert learned(found[i], using).startswith(f"{i % 500} é\u2028")
    with pytest.raises(IndexError):
        found[500]
    assert example({"text": "0 é\u2028"}, using) != found[0] == example(found.record(0), using)
    assert len(whole(Records(folder, "train", using, max_tokens=7)[3])) == 7


def test_the_index_is_kept_and_made_again_when_the_file_changes(folder, monkeypatch):
    Records(folder, "train", None)
    index = folder / "train.index.npy"
    assert index.is_file() and np.load(index).shape == (501,)
    monkeypatch.setattr(io, "line_starts", lambda path: pytest.fail("the index was there"))
    assert len(Records(folder, "train", None)) == 500
    monkeypatch.undo()
    with open(folder / "train.jsonl", "a") as file:
        file.write('{"id": "more", "text": "more"}\n')
    assert Records(folder, "train", None).record(500)["id"] == "more"
    index.write_bytes(b"no index")
    assert len(Records(folder, "train", None)) == 501
    monkeypatch.setattr(io, "SCANNED", 7)
    index.unlink()
    starts = Records(folder, "train", None).lines.starts
    raw = (folder / "train.jsonl").read_bytes()
    assert [raw[a:b] for a, b in pairwise(starts)] == raw.splitlines(keepends=True)


def test_a_damaged_line_is_named(folder):
    lines = (folder / "train.jsonl").read_text().split("\n")
    lines[7], lines[8], lines[9] = lines[7][:-9], '{"id": "8"}', '{"messages": [{"role": "user"}]}'
    (folder / "train.jsonl").write_text("\n".join(lines))
    found = Records(folder, "train", tokenizer(LINES))
    for number, says in ((8, "is damaged"), (9, "must have one of"), (10, "must begin with a question")):
        with pytest.raises(RecordError, match=rf"train.jsonl:{number}:? .*{says}"):
            found[number - 1]
    assert found[10] is not None


def test_folders_that_are_none_or_not_ready_are_refused(folder, tmp_path_factory):
    with pytest.raises(RecordError, match="no prepared data; `kvgraph data prepare` makes it"):
        Records(tmp_path_factory.mktemp("empty"), "train", None)
    with pytest.raises(RecordError, match="no split 'test'; there are train, validation"):
        Records(folder, "test", None)
    (folder / "prepared.json").write_text(json.dumps({"finished": False}))
    with pytest.raises(RecordError, match="isn't finished; run its `kvgraph data prepare` again"):
        Records(folder, "train", None)


def test_the_demos_tokenizer_learns_to_end_what_its_template_does_not(tmp_path):
    demo.write_model(tmp_path)
    using = load_tokenizer(tmp_path)
    assert learned(example(TASK, using), using) == "the guild<|end|>"
