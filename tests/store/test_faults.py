"""What must not happen, whatever happens: a wrong record is served, or a good one is lost to somebody else's trouble.

`KVGRAPH_SOAK=1` kills four writers 50 times, without it 4 times; the code is the same.
"""

import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

import store_worker
from kvgraph.errors import StoreError
from kvgraph.store import DiskStore
from kvgraph.store.disk import index as index_module
from kvgraph.store.disk import store as disk_module
from soak import SOAK
from store_worker import UNIVERSE, got, key_of, make, same

KILLS, WRITERS = 50 if SOAK else 4, 4
CAPACITY = 5_000_000  # bytes; all records together take 13 MB, so writing and eviction never end


class Workers:
    """A process that forks writers and readers of a store quickly; see store_worker.py."""

    def __init__(self, folder: Path, capacity: int = CAPACITY):
        command = [sys.executable, store_worker.__file__, str(folder), str(capacity)]
        self.parent = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._line() == "ready"

    def start(self, what: str, seed: int) -> int:
        return self._ask(f"{what} {seed}")

    def wait(self, pid: int) -> int:
        """Exit status: 0, WRONG, or minus the signal that ended it."""
        return self._ask(f"wait {pid}")

    def _ask(self, line: str) -> int:
        assert self.parent.stdin is not None
        self.parent.stdin.write(line + "\n")
        self.parent.stdin.flush()
        return int(self._line())

    def _line(self) -> str:
        assert self.parent.stdout is not None
        return self.parent.stdout.readline().strip()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.parent.communicate()  # closes its input, which ends it
        assert self.parent.returncode == 0


def path_of(folder: Path, key: str) -> Path:
    return folder / "records" / key[:2] / f"{key}.safetensors"


def filled(folder: Path, count: int = 3) -> DiskStore:
    """A store with records 0 ... count-1."""
    store = DiskStore(folder)
    for n in range(count):
        store.put(make(key_of(n)))
    return store


def all_right(store: DiskStore, count: int) -> bool:
    return all((r := got(store, key_of(n))) is not None and same(r, make(key_of(n))) for n in range(count))


# -- killed processes --------------------------------------------------------------------------------------------------


def test_killed_writers(tmp_path):
    """Four processes write into one store and are killed at a random moment, again and again."""
    rng = random.Random(int.from_bytes(os.urandom(4), "little"))
    leftovers = served = 0
    with Workers(tmp_path) as workers:
        for kill in range(KILLS):
            pids = [workers.start("write", rng.randrange(10**9)) for _ in range(WRITERS)]
            for pid in pids:
                time.sleep(rng.uniform(0.01, 0.25))
                os.kill(pid, signal.SIGKILL)
            for pid in pids:
                assert workers.wait(pid) == -signal.SIGKILL, "a writer ended by itself: it was served a wrong record"
            store = DiskStore(tmp_path)  # a new process as far as checksums go
            for number in range(UNIVERSE):
                record = got(store, key_of(number))
                assert record is None or same(record, make(key_of(number))), f"wrong KV after kill {kill}"
                served += record is not None
            report = store.verify()
            leftovers += report.temporary
            moved = [p.name for p in (tmp_path / "quarantine").glob("*")]
            assert report.clean and store.counts()["bad"] == 0 and not moved
            assert not list(tmp_path.glob("records/*/.tmp-*")) and not report.foreign
            assert {e.key for e in store.ls()} == {p.stem for p in tmp_path.glob("records/*/*.safetensors")}
            assert store.verify().temporary == 0
            store.close()
    assert served > 0
    if KILLS >= 50:
        assert leftovers > 0, "no writer was ever killed while it wrote: this test shows nothing"
    print(f"{KILLS * WRITERS} kills: {served} records read and right, {leftovers} unfinished files removed")


def test_the_check_of_the_kill_test_can_fail():
    right, other = make(key_of(1)), make(key_of(1))
    assert same(right, other)
    other.values[1][2, 3, 4] += 1e-6
    assert not same(right, other) and not same(right, make(key_of(2)))


def test_processes_fight_over_one_key(tmp_path):
    with Workers(tmp_path) as workers:
        pids = [workers.start("fight", seed) for seed in range(3)]
        assert [workers.wait(pid) for pid in pids] == [0, 0, 0]
    store = DiskStore(tmp_path)
    report = store.verify()
    assert report.clean and not report.temporary and not (tmp_path / "quarantine").exists()


def test_eviction_while_others_read(tmp_path):
    """Readers keep correct data of records whose files are evicted under them."""
    with Workers(tmp_path, capacity=3_000_000) as workers:
        readers = [workers.start("read", seed) for seed in range(2)]
        store = DiskStore(tmp_path, capacity_bytes=3_000_000)
        for number in [*range(UNIVERSE)] * 2:
            store.put(make(key_of(number)))
        assert [workers.wait(pid) for pid in readers] == [0, 0]
    assert 0 < store.stat().bytes <= 3_000_000 and store.verify().clean


def test_leftovers_of_living_writers_stay(tmp_path):
    """`verify` tells a dead writer's temporary file from a living one's, however old."""
    store = filled(tmp_path, 1)
    folder = path_of(tmp_path, key_of(0)).parent
    (folder / ".tmp-dead").write_bytes(b"half a rec")
    alive = threading.Event()
    verified = threading.Event()

    def buffers():  # what a writer that takes its time writes
        alive.set()
        verified.wait(10)
        yield b"whole"

    writer = threading.Thread(target=disk_module.write_atomically, args=(folder / "file", buffers()))
    writer.start()
    assert alive.wait(10)
    assert store.verify().temporary == 1
    verified.set()
    writer.join()
    assert (folder / "file").read_bytes() == b"whole" and not list(folder.glob(".tmp-*"))


# -- damaged and foreign files -----------------------------------------------------------------------------------------


def assert_moved_aside(folder: Path, key: str) -> None:
    """The record is a miss, is in quarantine, and can be put again."""
    store = DiskStore(folder)
    assert store.get(key) is None
    assert not path_of(folder, key).exists() and list((folder / "quarantine").glob(f"{key}*"))
    assert store.counts()["bad"] == 1
    store.put(make(key))
    assert same(got(store, key), make(key))
    shutil.rmtree(folder / "quarantine")


def test_flipped_bits(tmp_path):
    filled(tmp_path, 2).close()
    path = path_of(tmp_path, key_of(0))
    good = path.read_bytes()
    data = 8 + int.from_bytes(good[:8], "little")
    text_end = good.rindex(b"}", 0, data)
    rng = random.Random(0)
    regions = {
        "length": (0, 8),
        "header": (60, text_end),
        "padding": (text_end + 1, data),
        "payload": (data, len(good)),
    }
    for begin, end in regions.values():
        for _ in range(3):
            damaged = bytearray(good)
            damaged[rng.randrange(begin, end)] ^= 1 << rng.randrange(8)
            path.write_bytes(damaged)
            assert_moved_aside(tmp_path, key_of(0))
    assert all_right(DiskStore(tmp_path), 2)


def test_truncated_files(tmp_path):
    filled(tmp_path, 1).close()
    path = path_of(tmp_path, key_of(0))
    good = path.read_bytes()
    for length in (0, 1, 7, 8, 60, 100, 4095, 4096, len(good) // 2, len(good) - 1):
        path.write_bytes(good[:length])
        assert_moved_aside(tmp_path, key_of(0))


def test_damage_is_noticed_by_get_and_by_verify(tmp_path):
    """Also of a record that this process has loaded before, when its file is another one now."""
    store = filled(tmp_path)
    assert all_right(store, 3)
    for n in (0, 1):
        path = path_of(tmp_path, key_of(n))
        damaged = bytearray(path.read_bytes())
        damaged[len(damaged) // 2] ^= 1
        path.unlink()
        path.write_bytes(damaged)
    assert store.get(key_of(0)) is None
    report = store.verify()
    assert [key for key, _ in report.bad] == [key_of(1)] and "checksum" in report.bad[0][1]
    assert not report.clean and report.good == 1 and [e.key for e in store.ls()] == [key_of(2)]
    assert store.stat().quarantined == 2 and store.verify().clean


def test_a_wrong_key_inside(tmp_path):
    store = filled(tmp_path, 2)
    shutil.copy(path_of(tmp_path, key_of(0)), path_of(tmp_path, key_of(1)))
    assert store.get(key_of(1)) is None and store.get(key_of(0)) is not None
    store.put(make(key_of(1)))
    assert all_right(store, 2)


def test_a_record_of_another_model(tmp_path):
    DiskStore(tmp_path, fingerprint="one").put(make(key_of(0)))
    assert DiskStore(tmp_path, fingerprint="two").get(key_of(0)) is None


def test_foreign_files_are_left_alone_and_reported(tmp_path):
    store = filled(tmp_path, 1)
    key = key_of(0)
    wrong_folder = "00" if key[:2] != "00" else "01"
    (tmp_path / "records" / wrong_folder).mkdir(exist_ok=True)
    foreign = [
        tmp_path / "records" / "README",
        tmp_path / "records" / wrong_folder / f"{key}.safetensors",
        tmp_path / "records" / key[:2] / "model.safetensors",
        tmp_path / "records" / key[:2] / f"{key}.safetensors.bak",
    ]
    for path in foreign:
        path.write_text("mine")
    report = store.verify()
    assert set(report.foreign) == set(map(str, foreign)) and report.clean and report.good == 1
    assert all(path.read_text() == "mine" for path in foreign)
    assert len(store.ls()) == 1 and store.prune(max_bytes=0)[0] == 1
    assert all(path.exists() for path in foreign)


@pytest.mark.parametrize("kind", ["folder", "fifo", "empty"])
def test_what_is_no_file_at_a_records_place(tmp_path, kind):
    store = DiskStore(tmp_path)
    path = path_of(tmp_path, key_of(0))
    path.parent.mkdir()
    {"folder": path.mkdir, "fifo": lambda: os.mkfifo(path), "empty": path.touch}[kind]()
    assert store.get(key_of(0)) is None
    store.put(make(key_of(0)))
    assert all_right(store, 1)


def test_a_record_of_another_format_version_stays(tmp_path):
    store = filled(tmp_path, 1)
    path = path_of(tmp_path, key_of(0))
    later = path.read_bytes().replace(b'"kvgraph":"1"', b'"kvgraph":"2"', 1)
    path.unlink()
    path.write_bytes(later)
    assert store.get(key_of(0)) is None and path.read_bytes() == later
    report = store.verify()
    assert [key for key, _ in report.unsupported] == [key_of(0)] and report.clean and path.exists()


@pytest.mark.parametrize("version", ["kvgraph-store 2", "", "\xff\xfe", "kvgraph-store 11"])
def test_a_store_of_another_format_version_is_refused(tmp_path, version):
    filled(tmp_path, 1).close()
    (tmp_path / "VERSION").write_bytes(version.encode("latin-1"))
    with pytest.raises(StoreError, match="but this version reads 'kvgraph-store 1'"):
        DiskStore(tmp_path)


# -- a folder that can't be written ------------------------------------------------------------------------------------


@contextmanager
def tmpfs(folder: Path, size: str):
    """A small file system of its own; needs the right to mount."""
    folder.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True, text=True
    )
    if mount.returncode:
        pytest.skip(f"NOT SHOWN HERE: this user can't mount a tmpfs ({mount.stderr.strip()})")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def test_a_read_only_folder(tmp_path):
    with tmpfs(tmp_path / "kv", "20m") as folder:
        filled(folder).close()
        damaged = bytearray(path_of(folder, key_of(2)).read_bytes())
        damaged[-1] ^= 1
        path_of(folder, key_of(2)).write_bytes(damaged)
        subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
        store = DiskStore(folder)
        assert all_right(store, 2) and store.get(key_of(2)) is None
        for change in (
            lambda: store.put(make(key_of(3))),
            lambda: store.delete(key_of(0)),
        ):
            with pytest.raises(StoreError, match="isn't writable; records in it are still read"):
                change()
        for change in (lambda: store.prune(max_bytes=0), lambda: store.pin(key_of(0))):
            with pytest.raises(StoreError, match="index .* can't be written"):
                change()
        store.put(make(key_of(0)))  # is there: nothing to do
        assert {e.key for e in store.ls()} == {key_of(n) for n in range(3)} and store.stat().records == 3
        assert [key for key, _ in store.verify().bad] == [key_of(2)]
        store.close()


def test_a_full_disk(tmp_path):
    with tmpfs(tmp_path / "kv", "4m") as folder:
        store = DiskStore(folder)
        kept = []
        with pytest.raises(StoreError, match="the disk is full; .* `kvgraph store gc`"):
            for number in range(UNIVERSE):
                store.put(make(key_of(number)))
                kept.append(number)
        assert kept, "the disk was full before anything was kept"
        assert all((r := got(store, key_of(n))) and same(r, make(key_of(n))) for n in kept)
        assert not list(folder.glob("records/*/.tmp-*"))
        assert store.verify().clean
        store.delete(key_of(kept[0]))
        store.put(make(key_of(kept[0])))
        (folder / "ballast").write_bytes(bytes(os.statvfs(folder).f_bavail * os.statvfs(folder).f_bsize))
        with pytest.raises(StoreError, match="the disk is full"):  # not a byte left, for the index neither
            store.put(make(key_of(39)))
        assert DiskStore(folder).get(key_of(kept[-1])) is not None
        store.close()


def test_a_full_disk_while_opening(tmp_path):
    with tmpfs(tmp_path / "kv", "64k") as folder:
        with pytest.raises(OSError, match="No space"):
            (folder / "ballast").write_bytes(bytes(10**6))
        with pytest.raises(StoreError, match="the disk is full"):
            DiskStore(folder)


@pytest.mark.parametrize("kind", ["a folder", "immutable"])
def test_one_file_that_cannot_be_removed_stops_nobody(tmp_path, kind):
    """The least recently used record can't go: others go instead, and new ones are kept."""
    store = DiskStore(tmp_path, capacity_bytes=2_000_000)
    store.put(make(key_of(0)))
    path = path_of(tmp_path, key_of(0))
    if kind == "a folder":
        path.unlink()
        path.mkdir()
        (path / "something").touch()
    elif subprocess.run(["chattr", "+i", path], capture_output=True).returncode:
        pytest.skip("NOT SHOWN HERE: this file system, or this user, can't make files immutable (chattr +i)")
    try:
        for number in range(1, UNIVERSE):
            store.put(make(key_of(number)))
            assert same(got(store, key_of(number)), make(key_of(number)))
        files = [p for p in tmp_path.glob("records/*/*.safetensors") if p.is_file()]
        assert sum(p.stat().st_size for p in files) <= 2_000_000 and len(files) > 2
        with pytest.raises(StoreError, match=r"can't remove 1 records \(others were removed: [1-9]"):
            store.prune(max_bytes=0)
        assert [p for p in tmp_path.glob("records/*/*.safetensors")] == [path]
    finally:
        if kind == "immutable":
            subprocess.run(["chattr", "-i", path], check=True)


# -- the index ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(index_module, "BUSY_TIMEOUT", 0.05)


def spoil_deleted(folder):
    (folder / "index.sqlite").unlink()


def spoil_deleted_but_for_the_log(folder):
    (folder / "index.sqlite-wal").write_bytes(os.urandom(5000))
    (folder / "index.sqlite").unlink()


def spoil_overwritten(folder):
    (folder / "index.sqlite").write_bytes(os.urandom(20_000))


def spoil_emptied(folder):
    (folder / "index.sqlite").write_bytes(b"")


def spoil_pages(folder):
    data = bytearray((folder / "index.sqlite").read_bytes())
    data[4096:] = os.urandom(len(data) - 4096)
    (folder / "index.sqlite").write_bytes(data)


def spoil_schema(folder):
    with sqlite3.connect(folder / "index.sqlite") as db:
        db.execute("DROP TABLE records")


def spoil_version(folder):
    with sqlite3.connect(folder / "index.sqlite") as db:
        db.execute("PRAGMA user_version = 7")


SPOIL = [
    spoil_deleted,
    spoil_deleted_but_for_the_log,
    spoil_overwritten,
    spoil_emptied,
    spoil_pages,
    spoil_schema,
    spoil_version,
]


@pytest.mark.parametrize("spoil", SPOIL)
def test_a_spoilt_index_is_rebuilt(tmp_path, spoil):
    filled(tmp_path).close()
    spoil(tmp_path)
    store = DiskStore(tmp_path)
    assert all_right(store, 3) and store.counts()["bad"] == 0
    assert {e.key for e in store.ls()} == {key_of(n) for n in range(3)}
    assert {e.tokens for e in store.ls()} == {len(make(key_of(n))) for n in range(3)}
    store.put(make(key_of(3)))
    assert len(store.ls()) == 4 and all_right(store, 4) and store.verify().clean


@pytest.mark.parametrize("spoil", [spoil_deleted, spoil_schema])
def test_an_index_spoilt_while_it_is_open(tmp_path, spoil):
    store = filled(tmp_path)
    spoil(tmp_path)
    store.put(make(key_of(3)))
    assert all_right(store, 4)
    other = DiskStore(tmp_path)
    assert {e.key for e in other.ls()} == {key_of(n) for n in range(4)}
    other.pin(key_of(1))
    assert [e.key for e in store.ls() if e.pinned] == [key_of(1)]  # both use the new index


def test_a_locked_index_stops_nobody(tmp_path, impatient):
    filled(tmp_path).close()
    other = sqlite3.connect(tmp_path / "index.sqlite", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    store = DiskStore(tmp_path)
    began = time.perf_counter()
    assert all_right(store, 3)
    store.put(make(key_of(3)))
    assert all_right(store, 4) and {e.key for e in store.ls()} >= {key_of(n) for n in range(3)}
    with pytest.raises(StoreError, match="locked"):
        store.pin(key_of(0))
    assert time.perf_counter() - began < 5 and store.counts()["index_errors"] > 0
    other.execute("ROLLBACK")
    other.close()
    store.pin(key_of(0))
    assert store.verify().rows_added == 1
    assert {e.key for e in store.ls()} == {key_of(n) for n in range(4)}


def test_a_get_never_waits_for_the_index(tmp_path, monkeypatch):
    """Last uses are written now and then by gets; a lock held by another process costs them no time."""
    monkeypatch.setattr(disk_module, "TOUCH_AT_MOST", 1)
    filled(tmp_path).close()
    store = DiskStore(tmp_path)
    assert store.get(key_of(1)) is not None and DiskStore(tmp_path).ls()[0].key == key_of(1)
    assert store.ls() and store.get(key_of(0)) is not None  # now its index is open
    assert DiskStore(tmp_path).ls()[0].key == key_of(0) and store.counts()["index_errors"] == 0
    other = sqlite3.connect(tmp_path / "index.sqlite", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    for fresh in (DiskStore(tmp_path), store):
        began = time.perf_counter()
        assert fresh.get(key_of(0)) is not None
        assert time.perf_counter() - began < 1
    assert store.counts()["index_errors"] > 0
    other.close()


def test_a_row_that_lies_does_no_harm(tmp_path):
    store = filled(tmp_path)
    with sqlite3.connect(tmp_path / "index.sqlite") as db:
        db.execute("UPDATE records SET size = 1, tokens = 1, fingerprint = 'x', used = 0")
        db.execute("INSERT INTO records VALUES (?, 1, 0, 0, 0, 1, '', '', '')", ["../../../../" + "e" * 52])
    assert all_right(store, 3)
    assert store.prune(max_bytes=10**9) == (0, 0)
    store.close()
    assert all_right(DiskStore(tmp_path), 3) and len(store.ls()) == 3
