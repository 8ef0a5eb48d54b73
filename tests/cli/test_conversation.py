"""`ask --index` and `chat`: chunks found for a question, answers read from their stored KV, and what they cite."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import transformers

from kvgraph import demo, indexing, models
from kvgraph.cli import chat as chat_command
from kvgraph.cli import conversation
from kvgraph.data.chat import Document
from kvgraph.data.library import LIBRARY, Library, StoredSegment
from kvgraph.engine.engine import Engine
from kvgraph.methods import GraphKV

# The command line sets this before transformers is imported; in this process it may have been imported already.
transformers.utils.logging.disable_progress_bar()

TEXTS = {
    "cape": ("Lighthouse", "The lighthouse stands on the north cape. It was built of basalt."),
    "ships": ("Ships", "Ships pass the cape at night and look for its light."),
    "bread": ("Bread", "Bread is baked in an oven."),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model")
    demo.write_model(folder)
    return str(folder)


@pytest.fixture(scope="module")
def store(model, tmp_path_factory) -> str:
    """A store with the graph "sea", all of it encoded."""
    place = tmp_path_factory.mktemp("place") / "kv"
    with Engine(models.load(model), store=place) as engine:
        library = Library(place / LIBRARY, engine.model.fingerprint)
        segments = [
            StoredSegment(id, tuple(engine.tokenize(Document(text, title).filled("{title}\n{text}\n\n"))), title, text)
            for id, (title, text) in TEXTS.items()
        ]
        library.add("", segments, 9)
        graph = library.add_graph("", "sea", GraphKV(band=200), list(TEXTS), [(0, 1)], spans=4, tokens=300)
        engine.encode(library.part(graph).graph([0]), graph.method)
        library.close()
    return str(place)


def asked(run, *words) -> tuple[str, str]:
    code, out, err = run(*words, "--max-tokens", 5, "--no-check")
    assert code == 0, err
    return out, err


def test_a_question_is_answered_from_an_index(run, model, store):
    out, err = asked(run, "ask", model, "Where do ships pass?", "--index", "sea", "--store", store, "--retrieve", 2)
    assert out.endswith("\n[1] Ships (ships)\n[2] Lighthouse (cape)\n")
    assert " computed (" in err
    again, err = asked(run, "ask", model, "Where do ships pass?", "--index", "sea", "--store", store, "--retrieve", 2)
    assert again == out and "(0 of documents)" in err
    out, _ = asked(
        run, "ask", model, "Where do ships pass?", "--index", "sea", "--store", store, "--retrieve", 1, "--json"
    )
    answer = json.loads(out)
    assert [(c["id"], c["title"]) for c in answer["citations"]] == [("ships", "Ships")]
    out, _ = asked(run, "ask", model, "zebra", "--index", "sea", "--store", store, "--json")
    assert json.loads(out)["citations"] == []


def test_an_index_names_its_model(run, model, store):
    """`kvgraph index` notes it beside the library."""
    note = Path(store) / "indexes" / "sea.json"
    note.parent.mkdir(exist_ok=True)
    note.write_text(json.dumps({"format": indexing.FORMAT, "model": model}))
    try:
        out, _ = asked(run, "ask", "bread?", "--index", "sea", "--store", store)
        assert out.endswith("[1] Bread (bread)\n")
    finally:
        note.unlink()
    assert conversation.model_of(Path(store), "sea") == str(demo.adapter())


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["ask", "m", "q"], 2, "ask needs --documents CORPUS or --index NAME"),
        (["ask", "m", "q", "--index", "sea"], 2, "--index needs --store FOLDER"),
        (["ask", "m", "q", "--index", "sea", "--store", "redis://x/0"], 2, "--index needs --store FOLDER"),
        (["ask", "m", "q", "--index", "sea", "--store", "s", "--method", "full"], 2, "leave out --method"),
        (["ask", "m", "q", "--index", "sea", "--store", "s", "--documents", "d"], 2, "leave out --documents"),
        (["chat", "m", "--index", "sea", "--store", "s", "--method", "full"], 2, "leave out --method"),
        (["chat", "m", "--index", "sea"], 2, "--index needs --store FOLDER"),
    ],
)
def test_what_does_not_go_together_is_refused_before_a_model_is_loaded(run, words, code, said):
    got, out, err = run(*words)
    assert (got, out) == (code, "") and said in err and err.count("\n") == 1


def test_an_index_that_is_not_there_is_one_line(run, model, store):
    code, out, err = run("ask", model, "q", "--index", "land", "--store", store, "--no-check")
    assert (code, out) == (1, "") and "has no index 'land' of this model" in err and err.count("\n") == 1


def talk(run, monkeypatch, lines: str, *words) -> tuple[str, str]:
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    return asked(run, "chat", *words)


def test_lines_from_a_pipe_are_turns(run, monkeypatch, model, store):
    seen = []
    before = conversation.Indexed.prompt

    def noting(self, said, question, hits):
        seen.append(([*said], question))
        return before(self, said, question, hits)

    monkeypatch.setattr(conversation.Indexed, "prompt", noting)
    lines = "Where do ships pass?\n\n  What is bread?  \nzebra"
    out, err = talk(run, monkeypatch, lines, model, "--index", "sea", "--store", store, "--retrieve", 1)
    assert re.findall(r"\[1\] .*", out) == ["[1] Ships (ships)", "[1] Bread (bread)"]
    assert err.count("\n") == 1 and "doesn't declare tuning" in err
    assert [question for _, question in seen] == ["Where do ships pass?", "What is bread?", "zebra"]
    said = seen[-1][0]
    assert [message["role"] for message in said] == ["user", "assistant"] * 2
    assert said[0]["content"] == "Where do ships pass?" and out.startswith(said[1]["content"][:1])


def test_without_an_index_it_is_a_plain_chat(run, monkeypatch, model):
    out, err = talk(run, monkeypatch, "Hello\n", model)
    with Engine(models.load(model)) as engine:
        graph = chat_command._plain(engine, [], "Hello")
        assert out == engine.generate(graph, "full", max_tokens=5).text + "\n"
    assert "[1]" not in out and err == ""


def test_a_turn_that_does_not_fit_is_told_and_left_out(run, monkeypatch, model):
    out, err = talk(run, monkeypatch, "x" * 40_000 + "\nHello\n", model)
    assert err.count("\n") == 1 and "limit" in err and err.startswith("kvgraph: ")
    assert out == talk(run, monkeypatch, "Hello\n", model)[0]


class Impatient(io.StringIO):
    """Somebody who presses Ctrl-C when something has been answered."""

    def write(self, text: str) -> int:
        if text.strip() and not self.getvalue().strip():
            os.kill(os.getpid(), signal.SIGINT)
        return super().write(text)


def test_ctrl_c_ends_an_answer_and_not_the_conversation(run, monkeypatch, model):
    out = Impatient()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\nAnd?\n"))
    before = signal.getsignal(signal.SIGINT)
    code, _, err = run("chat", model, "--max-tokens", 500, "--no-check", "--seed", 1)
    assert (code, err) == (0, "") and signal.getsignal(signal.SIGINT) is before
    first, _, second = out.getvalue().partition("\n")
    assert len(first) < 100 < len(second)  # the first answer ended early, the second had its length


def test_in_a_terminal_there_is_help_and_a_way_out(monkeypatch, capsys):
    lines = iter(["Hello", "  /help", "/exit", "And?"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    assert list(chat_command._lines()) == ["Hello"] and next(lines) == "And?"
    assert capsys.readouterr().err == f"{chat_command.HINT}\n" * 2


@pytest.mark.slow
def test_ctrl_c_in_a_terminal(model):
    """The answer would be very long."""
    main, side = pty.openpty()
    command = [sys.executable, "-m", "kvgraph.cli", "chat", model, "--max-tokens", "20000", "--no-check"]
    process = subprocess.Popen(command, stdin=side, stdout=side, stderr=side, close_fds=True, start_new_session=True)
    os.close(side)
    seen = b""

    def until(pattern: bytes, seconds: float = 120) -> None:
        """Read until something is seen, and forget all up to its end."""
        nonlocal seen
        deadline = time.monotonic() + seconds
        while not (found := re.search(pattern, seen, re.DOTALL)):
            left = deadline - time.monotonic()
            assert left > 0 and select.select([main], [], [], left)[0], seen
            seen += os.read(main, 4096)
        seen = seen[found.end() :]

    try:
        until(rb"> ")
        process.send_signal(signal.SIGINT)
        until(rb"Ctrl-D ends the conversation")
        until(rb"> ")
        os.write(main, b"Hello\n")
        until(rb"Hello\r\n.{20}")
        process.send_signal(signal.SIGINT)
        until(rb"\r\n> ")
        os.write(main, b"\x04")
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
        os.close(main)
