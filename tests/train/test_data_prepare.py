"""`kvgraph data prepare`: every source on its sample, and the same files however often the work is killed."""

from __future__ import annotations

import gzip
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from kvgraph.cli import main
from kvgraph.data.io import locked
from kvgraph.data.task import Hub
from kvgraph.demo import write_model
from kvgraph.models import load_tokenizer
from kvgraph.train import prepare
from kvgraph.train.prepare import blocks, chats, rows, run, text
from kvgraph.train.prepare.source import PrepareError, Skip
from kvgraph.train.prepare.tokens import Tokens
from kvgraph.train.records import Records, texts

DATA = Path(os.environ.get("KVGRAPH_DATA", Path(__file__).parents[2] / ".." / "shared" / "data")).resolve()
OWN = [name for name in prepare.SOURCES if not name.startswith("qa-")]  # those have tests of their own
FILES = ("train.jsonl", "validation.jsonl", "prepared.json")


@pytest.fixture
def cli(capsys):
    """Run the command line in this process: (exit code, stdout, stderr)."""

    def cli(*words: object) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            main(["data", "prepare", *map(str, words)])
        out = capsys.readouterr()
        return int(exit_.value.code or 0), out.out, out.err

    return cli


@pytest.fixture(scope="module")
def tulu(tmp_path_factory) -> Path:
    """300 conversations in Tulu's schema; every tenth begins like another one."""
    rng, path = random.Random(1), tmp_path_factory.mktemp("tulu") / "tulu.jsonl"
    with open(path, "w", encoding="utf-8") as file:
        for i in range(300):
            turns = [" ".join(rng.choices(["salt", "ice", "é", "lamp"], k=9)) for _ in range(2 * rng.randint(1, 3))]
            turns[0] = f"Question {i - i % 10 if i % 10 == 1 else i}?"
            messages = [{"role": ("user", "assistant")[j % 2], "content": turn} for j, turn in enumerate(turns)]
            file.write(json.dumps({"id": "same", "messages": messages, "source": "sample"}) + "\n")
    return path


def prepared(name: str, path: Path, out: Path, **options) -> dict:
    return run.prepare(prepare.get(name), rows.reader(prepare.get(name), str(path)), out, **options)


def lines(out: Path, split: str = "train") -> list[dict]:
    return [json.loads(line) for line in (out / f"{split}.jsonl").read_text("utf-8").split("\n") if line]


def contents(out: Path) -> dict[str, bytes]:
    return {name: (out / name).read_bytes() for name in FILES}


# -- the sources ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OWN)
def test_a_source_goes_from_its_sample_to_examples(cli, tmp_path, name):
    code, out, err = cli(name, "--sample", "--validation", 0.3, "--out", tmp_path / "out")
    assert code == 0, err
    state = json.loads((tmp_path / "out" / "prepared.json").read_text())
    made = [record for split in ("train", "validation") for record in lines(tmp_path / "out", split)]
    counts = state["counts"]
    assert 2 <= len(made) == counts["train"]["records"] + counts["validation"]["records"]
    assert sum(len("".join(texts(r))) for r in made) == sum(counts[s]["characters"] for s in ("train", "validation"))
    assert f"{counts['read']} source records read" in out and len({record["id"] for record in made}) == len(made)
    (tmp_path / "model").mkdir()
    write_model(tmp_path / "model")
    using = load_tokenizer(tmp_path / "model")
    for split in ("train", "validation"):
        found = Records(tmp_path / "out", split, using)
        assert len(found) == counts[split]["records"]
        assert all(found[i] is not None for i in range(len(found)))


def test_documents_of_a_text_are_its_beginning(tmp_path):
    cut = re.compile(r"\n\nGo on with the text above where it ends\.")
    for name in ("fineweb-text-mem", "fineweb-text-inst"):
        source, out = prepare.get(name), tmp_path / name
        run.prepare(source, rows.reader(source, sample=True), out, tokenizer=Tokens.of_bytes(), validation=0)
        pages = [row.record["text"] for row in rows.reader(source, sample=True).rows()]
        for record in lines(out):
            page = pages[int(record["id"].rpartition("-")[2])]
            assert len(page.encode()) >= text.LONG and 5 <= len(record["documents"]) <= 40
            beginning = "".join(record["documents"])
            assert 500 <= len(beginning.encode()) <= 1500
            if name.endswith("mem"):
                assert beginning + record["text"] == page
            else:
                asked, answered = record["messages"]
                assert cut.fullmatch(asked["content"])
                assert page.startswith(beginning) and page[len(beginning) :].strip() == answered["content"]


def test_segments_are_cut_between_tokens_and_characters():
    bytewise = Tokens.of_bytes()
    page = "é漢🙂 " * 700
    for seed in range(20):
        segments, end, _ = text.segmented(page, bytewise.ends, random.Random(seed))
        assert "".join(segments) == page[:end] and all(segments) and 3 <= len(segments) <= 40
    with pytest.raises(Skip, match="shorter than 2,048 tokens"):
        text.segmented("x" * 2047, bytewise.ends, random.Random(0))
    with pytest.raises(Skip, match="nothing after the segments"):
        text.segmented("x" * 10 + " " * 3000, bytewise.ends, random.Random(0))


def test_an_answer_that_goes_on_with_a_long_text_ends_with_a_sentence():
    page = text.WebPage(text="This is a sentence of the text. " * 400)
    job = type("Job", (), {"tokenizer": Tokens.of_bytes()})
    (record,) = text.text_inst(page, job, random.Random(0))
    answer = record["messages"][1]["content"]
    assert answer.endswith("text.") and 3000 < len("".join(texts(record))) < text.FITS + 50


def test_words_keep_their_space_when_a_real_tokenizer_cuts():
    vocabulary = DATA / "gpt2_tokenizer"
    if not vocabulary.is_dir():
        pytest.skip(f"{vocabulary} is missing; set KVGRAPH_DATA to the folder that has it")
    merges = (vocabulary / "gpt2.vocab.bpe").read_text(encoding="utf-8").split("\n")[1:]
    known = json.loads((vocabulary / "gpt2.encoder.json").read_text(encoding="utf-8"))
    gpt2 = Tokenizer(models.BPE(known, [tuple(line.split(" ")) for line in merges if line]))
    gpt2.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens = Tokens(gpt2, "gpt2")
    segments, end, ends = text.segmented("the salt guild " * 800, tokens.ends, random.Random(0))
    assert len(ends) > 2048 and all(segment.startswith(" ") for segment in segments[1:])
    assert sum(map(tokens.count, segments)) == sum(e <= end for e in ends)


def conversation(*turns: str, first: str = "user") -> list[dict]:
    roles = ("user", "assistant") if first == "user" else ("assistant", "user")
    return [{"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns)]


def test_conversations_begin_with_a_question_and_end_with_an_answer():
    system = [{"role": "system", "content": "s"}]
    assert chats.alternating(system + conversation("q", "a", "thanks")) == system + conversation("q", "a")
    assert chats.alternating(conversation("hi", "q", "a", first="assistant")) == conversation("q", "a")
    for messages, why in (
        (conversation("q"), "no question with an answer"),
        ([], "no question with an answer"),
        (conversation("q", " \n"), "an empty message"),
        (conversation("q", "a") + conversation("a", first="assistant"), "don't take turns"),
        (conversation("q", "a") + system + conversation("q", "a"), "don't take turns"),
    ):
        with pytest.raises(Skip, match=why):
            chats.alternating(messages)


def test_earlier_exchanges_become_documents_and_the_system_message_stays():
    system = [{"role": "system", "content": "s"}]
    made = chats.earlier_as_documents(system + conversation("q1", "a1 ", "q2", "a2", "q3", "a3"))
    assert made["documents"] == ["User: q1\n\nAssistant: a1\n\n", "User: q2\n\nAssistant: a2\n\n"]
    assert made["messages"] == system + conversation("q3", "a3")


def test_system_messages_are_those_of_the_data(tmp_path):
    """None is added, and none grows from record to record."""
    for name in ("daring-anteater", "daring-anteater-mem", "tulu", "tulu-mem", "tulu-blocks"):
        source = prepare.get(name)
        raw = [row.record for row in rows.reader(source, sample=True).rows()]
        given = {r["system"] for r in raw if r.get("system")} | {
            m["content"] for r in raw for m in r.get("messages", ()) if m["role"] == "system"
        }
        run.prepare(source, rows.reader(source, sample=True), tmp_path / name, validation=0)
        found = [m["content"] for r in lines(tmp_path / name) for m in r["messages"] if m["role"] == "system"]
        assert found and set(found) <= given and len(given) == 1


def test_texts_are_cut_where_they_have_seams():
    assert blocks.seams("a\n\nb\n \n\n c\nd") == ["a\n\n", "b\n \n\n ", "c\nd"]
    assert blocks.seams("a\n---\nb\nc") == ["a\n---\n", "b\nc"]
    assert blocks.seams("a\n=====\nb") == ["a\n=====\n", "b"]
    assert blocks.seams("a\n\tb\n\tc\nd") == ["a\n\t", "b\n\t", "c\nd"]
    assert blocks.seams("a\nb") == ["a\n", "b"]
    assert blocks.seams("a well-known - thing") == ["a well-known - thing"]
    assert blocks.seams("\n\na\n\n") == ["\n\na\n\n"]
    assert blocks.merged(["aaaa", "b", "cc", "dddd"], 3) == ["aaaa", "bcc", "dddd"]
    assert blocks.merged(["a"] * 40, 14) != ["a"] * 40 and len(blocks.merged(["a"] * 40, 14)) == 14


def test_blocks_of_a_conversation():
    talk = conversation("one\n\ntwo", "a1\nb1", "q2\n\nnot cut", "a2")
    made = list(blocks.blocks(talk, random.Random(0)))
    assert [record["messages"][-1]["content"] for record in made] == ["a1\nb1", "a2"]
    assert made[1] == {
        "documents": ["User: one\n\n", "two\n\n", "Assistant: a1\n", "b1\n\n"],
        "messages": conversation("q2\n\nnot cut", "a2"),
    }
    firsts = [next(blocks.blocks(talk, random.Random(i))) for i in range(400)]
    cut = [record for record in firsts if "documents" in record]
    assert all(record["documents"] == ["one\n\n"] and record["messages"][0]["content"] == "two" for record in cut)
    assert all(record["messages"] == talk[:2] for record in firsts if "documents" not in record)
    assert 0.35 < len(cut) / 400 < 0.55
    coded = conversation("fix\n\nthis", "```python\nx\n```", "thanks\n\nmore?", "no")
    assert list(blocks.blocks(coded, random.Random(0))) == [{"messages": coded}]
    long = conversation(*(f"turn {i}\n\nand more" for i in range(12)))
    *_, last = blocks.blocks(long, random.Random(0))
    assert len(last["documents"]) == 10 and last["documents"][0] == "User: turn 0\n\nand more\n\n"


# -- the split --------------------------------------------------------------------------------------------------------


def test_what_begins_alike_is_on_one_side_in_any_order_and_source(tulu, tmp_path):
    raw = tulu.read_text().splitlines()
    shuffled = tmp_path / "shuffled.jsonl"
    shuffled.write_text("\n".join(random.Random(0).sample(raw, len(raw))) + "\n")
    sides: dict[str, set[str]] = {}
    for name, path in (("tulu", tulu), ("tulu", shuffled), ("tulu-blocks", tulu)):
        out = tmp_path / f"{name}-{path.stem}"
        state = prepared(name, path, out, validation=0.2, seed=len(sides))
        for split in ("train", "validation"):
            for record in lines(out, split):
                begins = "".join(texts(record)).removeprefix("User: ")
                sides.setdefault(re.match(r"Question \d+", begins)[0], set()).add(split)
    assert all(len(found) == 1 for found in sides.values()) and len(sides) == 270
    assert 0.12 < sum(found == {"validation"} for found in sides.values()) / 270 < 0.28
    assert state["counts"]["validation"]["records"] > 0
    assert prepared("tulu", tulu, tmp_path / "none", validation=0)["counts"]["validation"]["records"] == 0


# -- interrupted work -------------------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from kvgraph.train import prepare
from kvgraph.train.prepare import rows, run
name, path, out, at, every, torn = sys.argv[1:]
run.SAVED_BYTES = int(every)
source, made = prepare.get(name), 0
def count(state):
    global made
    made += 1
    if made == int(at):
        with open(os.path.join(out, "train.jsonl"), "ab") as file:
            file.write(b'{"id": "torn, "' * int(torn))
        os.kill(os.getpid(), signal.SIGKILL)
run.prepare(source, rows.reader(source, path), out, validation=0.2, on_progress=count)
"""


def test_killed_at_any_moment_the_files_end_up_the_same(tulu, tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "killed"
    prepared("tulu-blocks", tulu, whole, validation=0.2)
    read = []
    for at, every, torn in ((130, 1 << 20, 1), (90, 4000, 3), (60, 1, 0)):
        words = [sys.executable, "-c", KILLED, "tulu-blocks", tulu, out, at, every, torn]
        done = subprocess.run([str(word) for word in words], capture_output=True, text=True)
        assert done.returncode == -signal.SIGKILL, done.stderr
        state = json.loads((out / "prepared.json").read_text())
        read.append(state["counts"]["read"])
        assert not state["finished"] and os.path.getsize(out / "train.jsonl") >= state["bytes"]["train"]
    assert 0 == read[0] < read[1] < read[2] < 300
    assert prepared("tulu-blocks", tulu, out, validation=0.2)["finished"]
    assert contents(out) == contents(whole)
    before = os.stat(out / "train.jsonl").st_mtime_ns
    assert prepared("tulu-blocks", tulu, out, validation=0.2)["finished"]
    assert os.stat(out / "train.jsonl").st_mtime_ns == before


@pytest.mark.slow  # kills the command at random moments for a minute
def test_the_command_killed_at_random_moments(tulu, tmp_path):
    big = tmp_path / "big.jsonl"
    big.write_bytes(tulu.read_bytes() * 400)
    words = [sys.executable, "-m", "kvgraph.cli", "data", "prepare", "tulu-blocks", "--source", str(big), "--out"]
    assert subprocess.run([*words, str(tmp_path / "whole")]).returncode == 0
    rng, kills = random.Random(0), 0
    while True:
        process = subprocess.Popen([*words, str(tmp_path / "out")], stdout=subprocess.DEVNULL)
        try:
            process.wait(rng.uniform(1, 8))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
        else:
            break
    assert process.returncode == 0 and kills and contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_ctrl_c_keeps_what_is_there(tulu, tmp_path):
    big, out = tmp_path / "big.jsonl", tmp_path / "out"
    big.write_bytes(tulu.read_bytes() * 30)
    words = ["data", "prepare", "tulu", "--source", str(big), "--out", str(out)]
    process = subprocess.Popen(
        [sys.executable, "-c", "from kvgraph.train.prepare import run; run.SAVED_EVERY = 0.05; "
         f"from kvgraph.cli import main; main({words!r})"],
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while process.poll() is None and not ((out / "train.jsonl").exists() and os.path.getsize(out / "train.jsonl")):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130, err
    assert "prepared records are kept; run the same command again to continue" in err
    state = prepared("tulu", big, out)
    assert state["finished"] and state["counts"]["read"] == 9000
    prepared("tulu", big, tmp_path / "whole")
    assert contents(out) == contents(tmp_path / "whole")


def test_a_larger_limit_goes_on_and_a_smaller_is_refused(tulu, tmp_path):
    first = prepared("tulu-blocks", tulu, tmp_path / "out", limit=100)
    records = len(lines(tmp_path / "out")) + len(lines(tmp_path / "out", "validation"))
    assert 100 <= records <= 102 and first["finished"] and not first["exhausted"]
    prepared("tulu-blocks", tulu, tmp_path / "out", limit=200)
    prepared("tulu-blocks", tulu, tmp_path / "at once", limit=200)
    assert contents(tmp_path / "out") == contents(tmp_path / "at once")
    with pytest.raises(PrepareError, match="is prepared for 200 records; give another folder for 150"):
        prepared("tulu-blocks", tulu, tmp_path / "out", limit=150)
    prepared("tulu-blocks", tulu, tmp_path / "out")
    prepared("tulu-blocks", tulu, tmp_path / "all")
    assert contents(tmp_path / "out") == contents(tmp_path / "all")
    with pytest.raises(PrepareError, match="is prepared for all records"):
        prepared("tulu-blocks", tulu, tmp_path / "out", limit=999)


def test_another_preparation_in_the_same_folder_is_refused(cli, tulu, tmp_path):
    out = tmp_path / "out"
    assert cli("tulu", "--source", tulu, "--out", out)[0] == 0
    before = contents(out)
    other = tmp_path / "other.jsonl"
    other.write_bytes(tulu.read_bytes())
    for words, says in (
        (["tulu", "--source", tulu, "--seed", 1], "seed = 0, not 1"),
        (["tulu", "--source", tulu, "--validation", 0.5], "validation = 0.01, not 0.5"),
        (["tulu", "--source", other], r"source = .*tulu.jsonl.*other.jsonl"),
        (["tulu", "--sample"], "source = .*sample"),
        (["tulu-blocks", "--source", tulu], 'name = "tulu", not "tulu-blocks"'),
    ):
        code, _, err = cli(*words, "--out", out)
        assert code == 1 and err.count("\n") == 1 and re.search(says, err) and "give another folder" in err, err
    assert contents(out) == before
    (out / "prepared.json").unlink()
    code, _, err = cli("tulu", "--source", tulu, "--out", out)
    assert code == 1 and "has records but no prepared.json" in err


def test_two_processes_do_not_write_one_folder(cli, tulu, tmp_path):
    with locked(tmp_path / "out", PrepareError):
        code, _, err = cli("tulu", "--source", tulu, "--out", tmp_path / "out")
    assert code == 1 and "is being written by another process" in err


# -- bad input and bad disks ------------------------------------------------------------------------------------------


def test_a_bad_record_is_named_and_once_it_is_mended_nothing_was_lost(cli, tulu, tmp_path):
    good = tulu.read_text().split("\n")
    source, out = tmp_path / "tulu.jsonl", tmp_path / "out"
    for bad, says in (
        (good[200][:-20], "tulu.jsonl:201 is not JSON in UTF-8"),
        ('{"id": "x"}', "tulu.jsonl:201: record 'x': messages: Field required"),
        ('["x"]', "tulu.jsonl:201 holds a list"),
    ):
        source.write_text("\n".join([*good[:200], bad, *good[201:]]))
        code, _, err = cli("tulu", "--source", source, "--out", out)
        assert code == 1 and err.count("\n") == 1 and says in err, err
        assert len(lines(out)) + len(lines(out, "validation")) == 200
    source.write_text("\n".join(good))
    assert cli("tulu", "--source", source, "--out", out)[0] == 0
    assert cli("tulu", "--source", source, "--out", tmp_path / "whole")[0] == 0
    assert contents(out) == contents(tmp_path / "whole")


def test_what_was_read_must_not_change(tulu, tmp_path):
    good, source = tulu.read_text().split("\n"), tmp_path / "tulu.jsonl"
    source.write_text("\n".join(good))
    prepared("tulu", source, tmp_path / "out", limit=50)
    for changed in (good[1:], good[:20]):
        source.write_text("\n".join(changed))
        with pytest.raises(PrepareError, match="the first 50 records have changed since they were read"):
            prepared("tulu", source, tmp_path / "out")
    source.write_text("\n".join([*good[:50], *good[60:]]))
    assert prepared("tulu", source, tmp_path / "out")["counts"]["read"] == 290


def test_text_that_is_no_unicode_is_left_out_and_counted(tmp_path):
    (tmp_path / "t.jsonl").write_text('{"text": "half \\ud83d of it"}\n{"text": "whole"}\n{"text": " "}\n')
    state = prepared("fineweb-text", tmp_path / "t.jsonl", tmp_path / "out", tokenizer=Tokens.of_bytes())
    assert state["counts"]["skipped"] == {"text that isn't Unicode": 1, "empty": 1}
    assert [record["text"] for record in lines(tmp_path / "out")] == ["whole"]


@pytest.fixture
def full_disk():
    """Files may have 9,000 bytes while this is entered."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    @contextmanager
    def full() -> Iterator[None]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (9000, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    yield full
    signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_is_one_line_and_then_it_goes_on(cli, tulu, tmp_path, full_disk, monkeypatch):
    monkeypatch.setattr(run, "SAVED_BYTES", 2000)
    with full_disk():
        code, _, err = cli("tulu", "--source", tulu, "--out", tmp_path / "out")
    assert code == 1 and err.count("\n") == 1 and "fix that and run the same command again to continue" in err
    state = json.loads((tmp_path / "out" / "prepared.json").read_text())
    assert 5000 < os.path.getsize(tmp_path / "out" / "train.jsonl") == state["bytes"]["train"] < 9000
    monkeypatch.undo()
    prepared("tulu", tulu, tmp_path / "out")
    prepared("tulu", tulu, tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_folder_that_lost_records_is_refused(tulu, tmp_path):
    prepared("tulu", tulu, tmp_path / "out", limit=50)
    os.truncate(tmp_path / "out" / "train.jsonl", 100)
    with pytest.raises(PrepareError, match="train.jsonl is shorter than before"):
        prepared("tulu", tulu, tmp_path / "out")


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["tulu"], 2, "prepare needs a NAME and --out"),
        (["--out", "{}"], 2, "prepare needs a NAME and --out"),
        (["nothing", "--out", "{}"], 1, "there is no source 'nothing'; there are fineweb-text, "),
        (["tulu", "--out", "{}", "--sample", "--source", "x.jsonl"], 2, "--sample or --source, not both"),
        (["tulu", "--out", "{}", "--source", "./nowhere.jsonl"], 1, "there is no file or folder"),
        (["tulu", "--out", "{}", "--source", "."], 1, "holds no .jsonl, .ndjson, .json, .csv, .parquet file"),
        (["tulu", "--out", "{}", "--sample", "--set", "size=3"], 1, "tulu has no setting 'size'; there are: none"),
        (["tulu", "--out", "{}", "--sample", "--set", "size"], 2, "--set size has no value; write NAME=VALUE"),
        (["xsum", "--out", "{}", "--source", "{}/x.jsonl"], 1, "xsum counts tokens; give --tokenizer"),
        (["tulu", "--out", "{}/x.jsonl/out", "--sample"], 1, "Not a directory"),
        (["tulu", "--out", "{}"], 1, "can't get allenai/tulu-3-sft-mixture from the hub"),
    ],
)
def test_a_mistake_is_one_clear_line(cli, tmp_path, monkeypatch, words, code, says):
    (tmp_path / "x.jsonl").write_text("")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    found, _, err = cli(*(word.format(tmp_path) for word in words))
    assert (found, err.count("\n")) == (code, 1) and says in err, err


# -- where raw records come from --------------------------------------------------------------------------------------


def test_files_and_folders_of_every_kind_give_the_same_records(tulu, tmp_path):
    import pyarrow
    from pyarrow.parquet import write_table

    records = [json.loads(line) for line in tulu.read_text().splitlines()]
    (tmp_path / "a").mkdir()
    with gzip.open(tmp_path / "a" / "1.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(record) + "\n\n" for record in records[:100])
    (tmp_path / "a" / "2.json").write_text(json.dumps({"data": records[100:150]}))
    write_table(pyarrow.Table.from_pylist(records[150:]), tmp_path / "a" / "3.parquet", row_group_size=37)
    (tmp_path / "a" / "notes.txt").write_text("not data")
    prepared("tulu", tmp_path / "a", tmp_path / "mixed", limit=170)
    prepared("tulu", tmp_path / "a", tmp_path / "mixed")
    prepared("tulu", tulu, tmp_path / "plain")
    for name in ("train.jsonl", "validation.jsonl"):
        assert (tmp_path / "mixed" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
    where = [row.where for row in rows.Files(tmp_path / "a").rows()]
    assert where[1].endswith("1.jsonl.gz:3") and where[100].endswith("2.json, record 1")
    assert where[299].endswith("3.parquet, row 150")


def test_a_stream_goes_on_in_the_middle(tulu, tmp_path, monkeypatch):
    """A data set of the hub, as a folder: `datasets` streams both the same way."""
    import pyarrow
    from pyarrow.parquet import write_table

    records = [json.loads(line) for line in tulu.read_text().splitlines()]
    (tmp_path / "set").mkdir()
    for i in range(3):
        part = pyarrow.Table.from_pylist(records[100 * i : 100 * (i + 1)])
        write_table(part, tmp_path / "set" / f"train-{i:05d}-of-00003.parquet", row_group_size=30)
    monkeypatch.setattr(rows, "STATE_EVERY", 40)
    stream = rows.Stream(Hub(str(tmp_path / "set"), split="train"))
    everything = list(stream.rows())
    assert [row.record for row in everything] == records and [row.number for row in everything] == list(range(300))
    for stopped in (0, 1, 39, 40, 41, 99, 100, 179, 299):
        position = json.loads(json.dumps(everything[stopped].position))
        rest = list(stream.rows(position))
        assert [row.record for row in rest] == records[stopped + 1 :]
        assert [row.number for row in rest] == list(range(stopped + 1, 300))
    source = prepare.get("tulu")
    run.prepare(source, stream, tmp_path / "parts", limit=130)
    run.prepare(source, stream, tmp_path / "parts")
    run.prepare(source, stream, tmp_path / "whole")
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    ("name", "path", "least"),
    [("xsum", "xsum/xsum_0shot_300.jsonl.gz", 20), ("multi-news", "multi_news/multi_news_100.jsonl.gz", 90)],
)
def test_real_data(tmp_path, name, path, least):
    if not (DATA / path).is_file():
        pytest.skip(f"{DATA / path} is missing; set KVGRAPH_DATA to the folder that has it")
    write_model(tmp_path)
    state = prepared(name, DATA / path, tmp_path / "out", tokenizer=Tokens.load(str(tmp_path)), validation=0.1)
    assert state["counts"]["train"]["records"] + state["counts"]["validation"]["records"] >= least
    record = Records(tmp_path / "out", "train", load_tokenizer(tmp_path)).record(0)
    assert record["task"] == name and record["answer"] and all(document["text"] for document in record["documents"])


def test_list_shows_every_source_and_setting(cli):
    code, out, _ = cli("--list")
    assert code == 0
    for source in prepare.SOURCES.values():
        assert source.name in out and source.about in out and source.origin
        assert all(name in out for name in source.settings)
    named = [line.split()[0] for line in out.split("\n\n")[0].splitlines()[2:] if line and not line.startswith(" ")]
    assert [name for name, _ in groupby(named)][: len(OWN)] == OWN
