"""Chat prompts: pieces that joined are the template's own text, cut where later turns can't change them."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from kvgraph.data import chat as chatting
from kvgraph.data.chat import ChatError, Document, chat, opening, plain

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|h|>{{ m['role'] }}<|/h|>\n\n{{ m['content'] | trim }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|h|>assistant<|/h|>\n\n{% endif %}"
)
STRICT = (  # refuses a system message alone and a conversation that doesn't alternate, as some do
    "{% if messages[-1].role == 'system' %}{{ raise_exception('only a system message') }}{% endif %}" + CHATML
)
FORGETS = (  # drops the thoughts of earlier answers, as reasoning models' templates do
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' and not loop.last %}"
    "{{ m.content.split('</think>')[-1] }}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
ROLES = (  # every document a turn, as Granite has it
    "{{ '<s>system\n' + messages[0].content + '</s>\n' }}{% for d in documents or [] %}"
    "<s>document{% if d.title %} {{ d.title }}{% endif %}\n{{ d.text }}</s>\n{% endfor %}"
    "{% for m in messages[1:] %}<s>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
RANKED = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if documents %}<results>"
    "{% for d in documents %}Document: {{ loop.index0 }}\n{{ d.title }}\n{{ d.text }}\n\n{% endfor %}</results>{% endif %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
PHI = (  # an end token after the last turn, but only where no answer follows
    "{% for m in messages %}{% if m.role == 'system' and m.content %}<|system|>\n{{ m.content }}<|end|>\n"
    "{% elif m.role == 'user' %}<|user|>\n{{ m.content }}<|end|>\n"
    "{% elif m.role == 'assistant' %}<|assistant|>\n{{ m.content }}<|end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}<|endoftext|>{% endif %}"
)
LAST = (  # marks the last message
    "{% for m in messages %}{% if loop.last %}<|last|>{% endif %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
QWEN = (  # knows a system message anywhere, and no developer
    "{% for m in messages %}{% if m.role in ('system', 'user', 'assistant') %}<|im_start|>{{ m.role }}\n"
    "{{ m.content }}<|im_end|>\n{% elif m.role == 'tool' %}<|im_start|>user\n<tool_response>{{ m.content | tojson }}"
    "</tool_response><|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
RAISES = "{% for m in messages if m.role == 'developer' %}{{ raise_exception('Unknown role') }}{% endfor %}" + QWEN
TEMPLATES = {"chatml": CHATML, "llama3": LLAMA3, "forgets": FORGETS, "phi": PHI, "last": LAST, "qwen": QWEN}
TEMPLATES |= {"roles": ROLES, "ranked": RANKED, "raises": RAISES, "strict": STRICT}
SYSTEM, USER, ANSWER, AGAIN = (
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Who dug the harbour?"},
    {"role": "assistant", "content": "<think>Hm.</think>The guild."},
    {"role": "user", "content": "When?"},
)
TALKS = [[USER], [SYSTEM, USER], [SYSTEM, USER, ANSWER, AGAIN], [USER, ANSWER, AGAIN]]
DOCUMENTS = [Document("It was dug.", "Harbour"), Document("No title here."), Document("Third.", "Guild")]


def tokenizer(template: str | None, bos: bool = False) -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(alphabet)}, []))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens(["<bos>"])
    made = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<bos>")
    if bos:
        from tokenizers.processors import TemplateProcessing

        made.backend_tokenizer.post_processor = TemplateProcessing("<bos> $A", None, [("<bos>", 256)])
    made.chat_template = template
    return made


def joined(prompt) -> str:
    return "".join([*prompt.prefix, *prompt.segments, prompt.query])


def rendered(t, messages, **more) -> str:
    return t.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **more)


@pytest.mark.parametrize("template", [CHATML, LLAMA3, STRICT, FORGETS], ids=["chatml", "llama3", "strict", "forgets"])
@pytest.mark.parametrize("messages", TALKS, ids=["1", "s1", "s3", "3"])
def test_the_pieces_are_the_templates_text(template, messages):
    t = tokenizer(template)
    prompt = chat(t, messages)
    assert joined(prompt) == rendered(t, messages) and prompt.query and all(prompt.prefix)
    with_documents = chat(t, messages, DOCUMENTS)
    filled = "Harbour\nIt was dug.\n\nNo title here.\n\nGuild\nThird.\n\n"
    assert "".join(with_documents.segments) == filled
    last = {"role": "user", "content": filled + messages[-1]["content"]}
    assert joined(with_documents) == rendered(t, [*messages[:-1], last])
    assert with_documents.prefix and with_documents.query.startswith(messages[-1]["content"])


@pytest.mark.parametrize("template", [CHATML, LLAMA3, STRICT], ids=["chatml", "llama3", "strict"])
def test_a_turn_is_the_same_piece_in_the_next_turn(template):
    t = tokenizer(template)
    first, second = chat(t, [SYSTEM, USER]), chat(t, [SYSTEM, USER, ANSWER, AGAIN])
    third = chat(t, [SYSTEM, USER, ANSWER, AGAIN, ANSWER, USER])
    assert len(second.prefix) >= 3 and third.prefix[: len(second.prefix)] == second.prefix
    if template != STRICT:
        assert second.prefix[: len(first.prefix)] == first.prefix and first.prefix
    with_documents = chat(t, [SYSTEM, USER, ANSWER, AGAIN], DOCUMENTS)
    assert with_documents.prefix[: len(second.prefix) - 1] == second.prefix[:-1]


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_every_turn_reuses_the_turn_before(template):
    """All pieces of a turn's prefix are the first pieces of the next turn's, and all of its messages are in them."""
    t = tokenizer(template)
    talk, before = [SYSTEM, USER], ()
    for i in range(4):
        prefix = chat(t, talk).prefix
        assert prefix[: len(before)] == before
        known = talk[:-1] if template == LAST else talk  # whose last message stands elsewhere in the next turn
        assert all(message["content"] in "".join(prefix) for message in known)
        before = prefix
        talk = [*talk, {"role": "assistant", "content": f"The guild, {i}."}, {"role": "user", "content": f"More {i}?"}]


def test_a_cut_is_at_the_start_of_a_token():
    """The text that ends a conversation and the header of an answer both begin with "<|"."""
    raw = tokenizer(PHI)
    assert chat(raw, [USER]).prefix == ("<|user|>\nWho dug the harbour?<|end|>\n<|",)  # each character is a token
    raw.add_special_tokens({"additional_special_tokens": ["<|endoftext|>", "<|assistant|>"]})
    prompt = chat(raw, [USER])
    assert prompt.prefix == ("<|user|>\nWho dug the harbour?<|end|>\n",) and prompt.query == "<|assistant|>\n"


@pytest.mark.parametrize("template", [QWEN, RAISES, PHI], ids=["qwen", "raises", "phi"])
@pytest.mark.parametrize("documents", [[], DOCUMENTS], ids=["", "documents"])
def test_a_developer_is_the_system_where_the_template_has_none(template, documents):
    t = tokenizer(template)
    developer = {"role": "developer", "content": "Be brief."}
    assert chat(t, [developer, USER], documents) == chat(t, [SYSTEM, USER], documents)
    assert chat(tokenizer(CHATML), [developer, USER]).prefix[0].startswith("<|im_start|>developer\nBe brief.")


@pytest.mark.parametrize("documents", [[], DOCUMENTS], ids=["", "documents"])
def test_no_message_vanishes(documents):
    """Also one whose text stands in another message."""
    tool = {"role": "tool", "content": "Who"}
    with pytest.raises(ChatError, match=r"leaves message 1 out of the prompt \(role 'tool'\)"):
        chat(tokenizer(PHI), [USER, tool, AGAIN], documents)
    assert '<tool_response>"Who"</tool_response>' in joined(chat(tokenizer(QWEN), [USER, tool, AGAIN], documents))
    assert chat(tokenizer(PHI), [USER, {"role": "tool", "content": ""}, AGAIN])  # there is nothing to lose


@pytest.mark.parametrize("documents", [[], DOCUMENTS], ids=["", "documents"])
def test_an_answer_may_have_begun(documents):
    begun = {"role": "assistant", "content": "It was"}
    prompt = chat(tokenizer(CHATML), [USER, begun], documents, proceed=True)
    assert prompt.query.endswith("<|im_start|>assistant\nIt was")
    assert chat(tokenizer(CHATML), [USER], answer=False).query.endswith("harbour?<|im_end|>\n")


def test_a_template_that_forgets_thoughts_cuts_before_them():
    t = tokenizer(FORGETS)
    prompt = chat(t, [USER, ANSWER, AGAIN])
    assert "think" not in joined(prompt) and prompt.prefix[0] == "<user>Who dug the harbour?"


QWEN3 = (  # only answers after the last user message have thoughts, if only empty ones
    "{% set ns = namespace(last=-1) %}{% for m in messages if m.role == 'user' %}{% set ns.last = messages.index(m) %}"
    "{% endfor %}{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.index0 > ns.last %}"
    "<think>\n\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKS = ["<|im_start|>", "<|im_end|>", "<think>"]


class Counting(PreTrainedTokenizerFast):
    """Counts the characters it is given."""

    characters = 0

    def __call__(self, text, **more):
        Counting.characters += len(text)
        return super().__call__(text, **more)


def counting(added: Sequence[AddedToken | str], kind: str = "bytes") -> Counting:
    """A tokenizer with merges over spaces, words and the parts of marks, and with added tokens."""
    raw = Tokenizer(models.BPE(unk_token="x"))
    if kind == "llama":  # merges over anything between two added tokens
        raw.normalizer = normalizers.Sequence([normalizers.Prepend("_"), normalizers.Lowercase()])
    else:
        first = [pre_tokenizers.Metaspace(prepend_scheme="first")] if kind == "metaspace" else []
        raw.pre_tokenizer = pre_tokenizers.Sequence([*first, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    alphabet = [*pre_tokenizers.ByteLevel.alphabet(), *" \n"]
    trainer = trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet)
    text = "the harbour thinks <|im_start|>assistant\n\n<think>\n  it's <|im_end|>\n12 345É"
    raw.train_from_iterator([text] * 4, trainer)
    made = Counting(tokenizer_object=raw)
    made.add_tokens([AddedToken(a, normalized=False) if isinstance(a, str) else a for a in added])
    return made


def slowly(whole, part: str) -> int:
    """The end of what two texts share, from all tokens of both."""
    if whole.text.startswith(part):
        return len(part)
    same = len(os.path.commonprefix([part, whole.text]))
    starts = [
        {a for a, _ in whole.tokenizer(t, return_offsets_mapping=True).offset_mapping} for t in (part, whole.text)
    ]
    return max((at for at in starts[0] & starts[1] if at <= same), default=0)


ADDED = {
    "none": [],
    "marks": MARKS,
    "overlapping": [*MARKS, "<|", "<|im_start|>assistant", "|><", "<think>\n\n", "|>assistant\n\n<thi"],
    "strips": [
        AddedToken(MARKS[0], lstrip=True, normalized=False),
        AddedToken(MARKS[1], rstrip=True, normalized=False),
        "<think>",
        " <|",
        "\n\n<thi",
    ],
    "words": [AddedToken("think", single_word=True, normalized=False), AddedToken("r<|", normalized=True), *MARKS],
}
BITS = [
    *MARKS,
    "<|",
    "im_start|>",
    "<thi",
    "nk>",
    "think",
    " ",
    "  ",
    "\n\n",
    "assistant\n",
    "the harbour",
    "É",
    "'s",
    "x",
]
PAIRS = [(" <think>", " thinkx"), (" harbou<think>", " harbour<|im_start|>")]  # "think" and "r<|" aren't found in these


@pytest.mark.parametrize("kind", ["bytes", "metaspace", "llama"])
@pytest.mark.parametrize("added", ADDED.values(), ids=ADDED)
def test_a_window_finds_the_cuts_that_the_whole_text_has(added, kind, monkeypatch):
    t, dice = counting(added, kind), random.Random(0)

    def text(most: int) -> str:
        return "".join(dice.choices(BITS, k=dice.randrange(most)))

    pairs = [(begin + text(9), begin + text(9)) for begin in (text(30) for _ in range(300))]
    for one, part in PAIRS + pairs:
        whole = chatting._Whole(t, one)
        assert whole.shared(part) == slowly(whole, part), (whole.text, part)
    for template in (*TEMPLATES.values(), QWEN3):
        t.chat_template = template
        roles = ["system", *["user", "assistant"] * 3, "user"]
        talk = [{"role": role, "content": f"{i}{text(9)}x"} for i, role in enumerate(roles)]
        found = chat(t, talk)
        with monkeypatch.context() as patched:
            patched.setattr(chatting._Whole, "shared", slowly)
            assert chat(t, talk) == found


@pytest.mark.parametrize("template", [QWEN3, CHATML, PHI], ids=["qwen3", "chatml", "phi"])
@pytest.mark.parametrize("loop", [False, True], ids=["talk", "tools"])
def test_a_long_talk_is_tokenized_a_few_times_not_once_a_message(template, loop):
    """Also where all that a model did on its own lost its thoughts: then every part differs from the whole at its begin."""
    t = counting([*MARKS, "<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>"])
    t.chat_template = template
    roles = ["user", *["assistant"] * 40, "user"] if loop else [*["user", "assistant"] * 20, "user"]
    talk = [{"role": role, "content": f"{i} the harbour" * 20} for i, role in enumerate(roles)]
    Counting.characters = 0
    prompt = chat(t, talk)
    assert len(prompt.prefix) >= (2 if loop and template == QWEN3 else 40)
    assert Counting.characters < 4 * len(joined(prompt))


@pytest.mark.parametrize("template", [ROLES, RANKED], ids=["roles", "ranked"])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_documents_stand_where_the_template_has_a_place_for_them(template, count):
    t = tokenizer(template)
    prompt = chat(t, [SYSTEM, USER], DOCUMENTS[:count])
    given = [{"title": d.title, "text": d.text} for d in DOCUMENTS[:count]]
    assert joined(prompt) == rendered(t, [SYSTEM, USER], documents=given)
    assert len(prompt.segments) == count
    for segment, document in zip(prompt.segments, DOCUMENTS, strict=False):
        assert document.text in segment


def test_a_documents_text_does_not_depend_on_its_neighbours():
    t = tokenizer(ROLES)
    alone = chat(t, [SYSTEM, USER], DOCUMENTS[2:]).segments
    assert chat(t, [SYSTEM, USER], DOCUMENTS[::-1]).segments[0] == alone[0]
    assert chat(t, [SYSTEM, USER], DOCUMENTS).segments[2] == alone[0]


def test_a_template_of_ones_own_overrides_the_models():
    prompt = chat(tokenizer(ROLES), [SYSTEM, USER], DOCUMENTS, template="* {title}: {text}\n")
    assert prompt.segments[0] == "* Harbour: It was dug.\n" and prompt.segments[1] == "* : No title here.\n"
    assert prompt.query.startswith(USER["content"])


def test_bos_is_there_once():
    t = tokenizer(LLAMA3, bos=True)
    prompt = chat(t, [USER], DOCUMENTS)
    ids = [i for piece in prompt.prefix for i in t.encode(piece, add_special_tokens=False)]
    assert ids.count(256) == 1 and opening(t) == (256,) and opening(tokenizer(LLAMA3)) == ()
    assert plain(t, "Answer.\n", DOCUMENTS, "Who?").prefix == ("<bos>Answer.\n",)
    assert plain(tokenizer(None), "Answer.\n", [], "Who?").prefix == ("Answer.\n",)


def test_token_ids_stand_for_a_document():
    prompt = chat(tokenizer(ROLES), [SYSTEM, USER], [Document(tokens=(7, 8)), DOCUMENTS[0]])
    assert prompt.segments[0] == (7, 8) and prompt.graph([(0, 1)], ["a", "b"]).edges == ((0, 1),)


@pytest.mark.parametrize(
    ("template", "messages", "documents", "says"),
    [
        (None, [USER], [], "no chat template"),
        (CHATML, [SYSTEM], DOCUMENTS, "user message"),
        (STRICT, [SYSTEM], [], "only a system message"),
        (CHATML + CHATML, [USER], DOCUMENTS, "exactly once"),
        ("nothing", [USER], [], "leaves message 0 out"),
    ],
)
def test_what_can_not_be_laid_out_is_refused(template, messages, documents, says):
    with pytest.raises(ChatError, match=says):
        chat(tokenizer(template), messages, documents)


@pytest.mark.parametrize("template", ["{title}", "{text} {rank}", "{text", ""])
def test_a_document_template_must_hold_the_text(template):
    with pytest.raises(ChatError, match="text"):
        chat(tokenizer(CHATML), [USER], DOCUMENTS, template=template)


def test_braces_in_a_document_are_text():
    prompt = chat(tokenizer(CHATML), [USER], [Document("{title} {x}", "{text}")])
    assert prompt.segments == ("{text}\n{title} {x}\n\n",)
