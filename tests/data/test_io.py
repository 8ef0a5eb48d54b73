"""One reader of records, one atomic writer, one lock."""

import csv
import gzip
import json
import os
import resource
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvgraph import memo
from kvgraph.data import corpus, io
from kvgraph.errors import GraphError

ROWS = [{"title": f"T{i}", "text": f'line\u2028one, "{i}"\nline two'} for i in range(5)]


def jsonl(rows) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def table(path: Path) -> bytes:
    with open(path, "w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, ["title", "text"])
        writer.writeheader()
        writer.writerows(ROWS)
    return path.read_bytes()


def parquet(path: Path) -> bytes:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow.parquet import write_table

    write_table(pyarrow.Table.from_pylist(ROWS), path)
    return path.read_bytes()


FORMATS = {
    "": lambda path: jsonl(ROWS),
    ".jsonl": lambda path: b"\xef\xbb\xbf" + jsonl(ROWS).replace(b"\n", b"\n\n"),
    ".ndjson": lambda path: jsonl(ROWS).rstrip(b"\n"),
    ".json": lambda path: json.dumps({"version": 1, "data": ROWS}).encode(),
    ".csv": table,
    ".parquet": parquet,
}


@pytest.mark.parametrize("gz", ["", ".gz", ".GZ"])
@pytest.mark.parametrize("upper", [False, True])
@pytest.mark.parametrize("suffix", FORMATS)
def test_every_format_gives_the_same_records_and_documents(tmp_path, suffix, upper, gz):
    content = FORMATS[suffix](tmp_path / "made")
    path = tmp_path / f"rows{suffix.upper() if upper else suffix}{gz}"
    path.write_bytes(gzip.compress(content) if gz else content)
    assert [record for _, record in io.records(path)] == ROWS
    if suffix:  # without one, a corpus is text
        expected = [f"{row['title']}\n{row['text']}\n" for row in ROWS]
        assert [document.text for document in corpus.read(path)] == expected


def test_images_and_settings_among_documents_are_left_out_with_a_warning(tmp_path):
    (tmp_path / "a.md").write_text("# A", "utf-8")
    (tmp_path / "b.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR")
    (tmp_path / "c.json").write_text('{"panels": []}')
    (tmp_path / "d.json").write_text('[{"title": "T", "text": "t"}]')
    with pytest.warns(UserWarning) as told:
        found = corpus.load(tmp_path)
    assert [document.text for document in found] == ["# A", "T\nt\n"]
    assert [str(warning.message).removeprefix(f"{tmp_path}/") for warning in told] == [
        "b.png is left out: it is not text",
        "c.json is left out: it holds no list of records",
    ]
    (tmp_path / "d.json").write_text('[{"title": ')
    with pytest.warns(UserWarning), pytest.raises(corpus.CorpusError, match=r"d\.json is not JSON"):
        corpus.load(tmp_path)
    for alone, why in (("b.png", "not UTF-8"), ("c.json", "neither a list")):
        with pytest.raises(corpus.CorpusError, match=why):
            corpus.load(tmp_path / alone)


def test_a_csv_with_a_text_column_alone_is_a_corpus(tmp_path):
    (tmp_path / "a.csv").write_text('id,text\n7,"one, two"\n8,three\n')
    assert [(d.name, d.text) for d in corpus.read(tmp_path / "a.csv")] == [("7", "one, two\n"), ("8", "three\n")]


def test_a_folder_is_read_in_order_through_links_and_without_hidden_files(tmp_path):
    folder, elsewhere = tmp_path / "folder", tmp_path / "elsewhere"
    for place in (folder / "b", folder / ".hidden", elsewhere):
        place.mkdir(parents=True)
    (folder / "z.JSONL").write_bytes(jsonl(ROWS[4:]))
    (folder / "a.jsonl").symlink_to(elsewhere / "blob")
    (elsewhere / "blob").write_bytes(jsonl(ROWS[:1]))
    (folder / "b" / "c.json").write_text(json.dumps(ROWS[1:2]))
    (folder / "b" / "around").symlink_to(folder)  # a circle
    (folder / "linked").symlink_to(tmp_path / "inside")
    (tmp_path / "inside").mkdir()
    (tmp_path / "inside" / "d.jsonl").write_bytes(jsonl(ROWS[2:4]))
    (folder / ".hidden" / "x.jsonl").write_text("no JSON")
    (folder / ".lock").write_text("no JSON")
    (folder / "README.md").write_text("no records")
    assert [record for _, record in io.records(folder)] == ROWS
    (folder / "y.jsonl").symlink_to(tmp_path / "gone")
    with pytest.raises(io.DataError, match=r"can't read .*y\.jsonl: No such file"):
        list(io.records(folder))


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("x.jsonl", jsonl(ROWS[:2]) + b"{oops}\n", r"x\.jsonl:3 is not JSON in UTF-8: .*; fix or remove it"),
        ("x.jsonl", b'{"n": -Infinity}\n', r"x\.jsonl:1 is not JSON.*-Infinity isn't a JSON number"),
        ("x.jsonl", b"[1]\n", r"x\.jsonl:1 holds a list; every record must be a JSON object"),
        ("x.json", b'{"rows": []}', "holds neither a list of records nor one under 'data'"),
        ("x.json", b'[{"a": 1}, 2]', r"x\.json, record 2 holds a int"),
        ("x.csv", b"a,b\n1,2\n\n1,2,3\n", r"x\.csv, row 2 has 3 cells, but the header names 2 columns"),
        ("x.csv", b"a,b\n\xff,2\n", r"x\.csv isn't a table in UTF-8"),
        ("x.csv.gz", gzip.compress(b"a,b\n" * 999, mtime=0)[:-9], r"can't read .*x\.csv\.gz: "),
        ("x.json.gz", b"{}", r"can't read .*x\.json\.gz: Not a gzipped file"),
        ("x.parquet", b"PAR1 no", r"can't read .*x\.parquet"),
        ("x.parquet.gz", gzip.compress(b"PAR1 no", mtime=0), r"can't read .*x\.parquet\.gz"),
        ("x.txt", b"", r"\.txt isn't supported; use \.jsonl, \.ndjson, \.json, \.csv, \.parquet, each also with \.gz"),
    ],
)
def test_what_cannot_be_read_is_one_line_that_says_where(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(GraphError, match=says) as caught:
        list(io.records(tmp_path / name, GraphError))
    assert "\n" not in str(caught.value)


def test_what_is_passed_over_is_not_parsed(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(b"no JSON\n" + jsonl(ROWS[:1]))
    bad, good = io.scan(tmp_path / "x.jsonl")
    assert good.parse() == ROWS[0] and bad.raw == b"no JSON\n"


@given(st.lists(st.binary(max_size=9)))
def test_lines_by_number_are_the_files_lines(tmp_path_factory, parts):
    path = tmp_path_factory.mktemp("lines") / "x"
    path.write_bytes(b"\n".join(parts))
    lines = io.Lines(path)
    assert [lines[i] for i in range(len(lines))] == list(open(path, "rb"))
    with pytest.raises(IndexError):
        lines[len(lines)]


# -- writing ----------------------------------------------------------------------------------------------------------


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "x.json"
    io.write_json(path, {"é": 1})
    assert json.loads(path.read_bytes()) == {"é": 1} and path.stat().st_mode & 0o777 == 0o666 & ~umask()
    with pytest.raises(RuntimeError), io.replacing(path) as file:
        file.write(b"half")
        raise RuntimeError
    assert json.loads(path.read_bytes()) == {"é": 1} and os.listdir(tmp_path) == ["x.json"]


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_link_stays_a_link_and_a_pipe_is_written_to(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "x").write_text("old")
    (tmp_path / "x").symlink_to("real/x")
    io.write(tmp_path / "x", "new")
    assert (tmp_path / "x").is_symlink() and (tmp_path / "real" / "x").read_text() == "new"
    os.mkfifo(tmp_path / "pipe")
    got: list[str] = []
    reader = threading.Thread(target=lambda: got.append((tmp_path / "pipe").read_text()))
    reader.start()
    io.write(tmp_path / "pipe", "through")
    reader.join(10)
    assert got == ["through"]


def test_after_a_full_disk_files_are_as_they_were(tmp_path):
    path = tmp_path / "x"
    io.write(path, b"x" * 900)
    limit, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))
    try:
        with open(path, "ab", buffering=0) as file, pytest.raises(OSError, match="too large|No space"):
            io.append(file, b"y" * 200)
        with pytest.raises(OSError, match="too large|No space"):
            io.write(path, b"z" * 2000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == b"x" * 900 and os.listdir(tmp_path) == ["x"]


def test_a_torn_last_line_is_cut_off(tmp_path):
    path = tmp_path / "x"
    for content, lines in ((b"", []), (b"torn", []), (b"one\n\ntw", [b"one", b""]), (b"one\n", [b"one"])):
        path.write_bytes(content)
        assert io.whole_lines(path) == lines
        assert path.read_bytes() == b"".join(line + b"\n" for line in lines)


def test_a_folder_is_held_by_one_process_until_that_ends(tmp_path):
    program = (
        "import sys, time; from pathlib import Path; from kvgraph.data import io\n"
        "with io.locked(Path(sys.argv[1]), io.DataError): print('held', flush=True); time.sleep(60)\n"
    )
    other = subprocess.Popen([sys.executable, "-c", program, str(tmp_path / "a")], stdout=subprocess.PIPE)
    try:
        assert other.stdout is not None and other.stdout.readline() == b"held\n"
        with pytest.raises(GraphError, match="a is being written by another process; wait for it, or give another"):
            with io.locked(tmp_path / "a", GraphError):
                pass
        with io.locked(tmp_path / "a", GraphError, "one-file"):  # another lock
            pass
    finally:
        other.kill()
        other.wait()
    with io.locked(tmp_path / "a", GraphError):
        pass


def test_what_is_remembered_is_never_half_a_file(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    threads = [threading.Thread(target=lambda i=i: memo.remember("facts", f"k{i}", i)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    kept = json.loads((tmp_path / "kvgraph" / "facts.json").read_text())
    assert (
        kept and all(kept[key] == int(key[1:]) for key in kept) and os.listdir(tmp_path / "kvgraph") == ["facts.json"]
    )
    (tmp_path / "kvgraph").chmod(0o500)
    memo.remember("facts", "k", 1)  # a folder that can't be written is no memory, and no error
    (tmp_path / "kvgraph").chmod(0o700)


def test_without_a_home_nothing_is_remembered(monkeypatch):
    def nowhere():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", nowhere)
    memo.remember("facts", "k", 1)
    assert memo.recall("facts", "k") is None
