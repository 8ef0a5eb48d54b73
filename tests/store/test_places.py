"""Places as people write them: what is shown, what is refused, and which file systems are on another machine."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from kvgraph.cli import main
from kvgraph.errors import StoreError
from kvgraph.places import VARIABLE, StorePlace, places_of
from kvgraph.store import DiskStore
from kvgraph.store.disk import mounts
from kvgraph.store.disk import store as disk_module
from store_worker import got, key_of, make, same

SECRET = "hunter2"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"redis://user:{SECRET}@cache.example:6380/3?timeout=0.5", "redis://cache.example:6380/3"),
        (f"redis://:{SECRET}@h/0", "redis://h/0"),
        (f"redis://h/0?password={SECRET}", "redis://h/0"),
        (f"redis://user:12/{SECRET}@h/0", "redis://h/0"),
        ("s3://bucket/prefix", "s3://bucket/prefix"),
        ("kv", "kv"),
    ],
)
def test_a_place_shows_no_password(text, shown):
    place = StorePlace(text)
    assert str(place) == place.shown == shown and place.text == text
    assert SECRET not in f"{place!r} {place}" and place.has_password == (SECRET in text)


@pytest.mark.parametrize("text", [f"redis://user:{SECRET}/x@h/0", f"redis://[{SECRET}/0", f"redis://h:{SECRET}/0"])
def test_a_url_that_cannot_be_read_is_refused_without_showing_it(text):
    with pytest.raises(StoreError, match="redis://... of a store can't be read") as error:
        StorePlace(text)
    assert SECRET not in str(error.value) and error.value.__suppress_context__


def test_a_variable_holds_one_place_or_a_list():
    assert places_of("") == places_of(" ") == places_of("[]") == []
    assert places_of("a folder, and so on") == ["a folder, and so on"]
    assert places_of(' ["kv", "redis://h/0"]') == ["kv", "redis://h/0"]
    for wrong in ('["kv"', "[1]", '[""]', '{"a": 1}]', "[kv]"):
        with pytest.raises(StoreError, match="JSON list") if wrong[0] == "[" else pytest.raises(AssertionError):
            assert places_of(wrong) != [wrong]


@pytest.mark.parametrize(
    "words", [["encode", "m", "c"], ["ask", "m", "q", "--documents", "c"], ["serve", "--model", "m"]]
)
def test_a_password_on_the_command_line_is_refused(words, capsys):
    """`ps` shows it. The message says where else to put it, and doesn't repeat it."""
    with pytest.raises(SystemExit) as ended:
        main([*words, "--store", "kv", "--store", f"redis://:{SECRET}@h/0"])
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.count("\n") == 1 and SECRET not in said
    assert "redis://h/0" in said and VARIABLE in said and "KVGRAPH_REDIS_PASSWORD" in said


def test_reading_a_place_needs_no_torch():
    code = "import sys, kvgraph.places, kvgraph.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# -- network mounts ----------------------------------------------------------------------------------------------------

MOUNTS = """\
22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
30 22 0:26 / /data rw - nfs4 server:/export rw,vers=4.2
31 30 0:27 / /data/fast rw - xfs /dev/nvme0n1 rw
32 22 0:28 / /with\\040blank rw - cifs //server/share rw
33 22 0:29 / /over rw - ext4 /dev/sdb rw
34 22 0:30 / /over rw - nfs server:/b rw
35 22 0:31 / /fuse rw - fuse.sshfs me@there: rw
36 22 0:32 / /encrypted rw - fuse.gocryptfs /x rw
not a line
"""


@pytest.mark.parametrize(
    ("path", "kind", "remote"),
    [
        ("/home/me/kv", "ext4", False),
        ("/data", "nfs4", True),
        ("/data/kv/deep", "nfs4", True),
        ("/data/fast/kv", "xfs", False),
        ("/database", "ext4", False),
        ("/with blank/kv", "cifs", True),
        ("/over/kv", "nfs", True),
        ("/fuse/kv", "fuse.sshfs", True),
        ("/encrypted/kv", "fuse.gocryptfs", False),
    ],
)
def test_file_systems_of_other_machines(path, kind, remote, monkeypatch, tmp_path):
    assert mounts.kind_of(Path(path), MOUNTS) == kind and mounts.kind_is_remote(kind) == remote
    file = tmp_path / "mountinfo"
    file.write_text(MOUNTS)
    monkeypatch.setattr(mounts, "MOUNTS", file)
    assert mounts.is_remote(Path(path)) == remote


def test_where_the_system_does_not_tell_files_are_mapped(monkeypatch, tmp_path):
    monkeypatch.setattr(mounts, "MOUNTS", tmp_path / "none")
    assert not mounts.is_remote(tmp_path)


def test_on_a_network_mount_records_are_read_and_survive_a_truncated_file(monkeypatch, tmp_path):
    """A mapped file that somebody truncates ends the process with SIGBUS; one that was read doesn't change."""
    monkeypatch.setattr(disk_module, "is_remote", lambda folder: True)
    monkeypatch.setattr(disk_module.format, "map_file", None)  # nothing is mapped
    store, record = DiskStore(tmp_path), make(key_of(1))
    store.put(record)
    found = got(store, record.key)
    (file,) = tmp_path.glob("records/*/*")
    with open(file, "rb+") as opened:
        opened.truncate(100)
    assert same(found, record)
    assert got(store, record.key) is None and store.counts()["bad"] == 1, "it is checked each time it is read"
    store.put(record)
    assert same(got(store, record.key), record) and store.verify().clean
    assert [entry.tokens for entry in store.ls()] == [len(record)]
