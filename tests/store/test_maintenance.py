"""Maintenance over every kind of place, with real servers: what is there, what goes, and what arrives elsewhere."""

from __future__ import annotations

import io
import json
import random
import tarfile
import time

import pytest

from kvgraph.errors import StoreError
from kvgraph.store import DiskStore, archive, format, open_store
from kvgraph.store.base import Entry, tenant_id
from kvgraph.store.codecs.registry import fingerprint_with, packed, parse, repacked
from kvgraph.store.maintenance import RecordFilter, find, garbage, migrate, shares
from kvgraph.store.open import open_catalog
from remotes import has_redis
from store_worker import got, key_of, make, same

A, B = "a" * 64, "b" * 64  # models
KIVI = parse("kivi")


@pytest.fixture(params=["folder", "redis", "s3"])
def place(request, tmp_path, monkeypatch):
    """A folder or URL where nothing is kept yet."""
    if request.param == "folder":
        return str(tmp_path / "kv")
    if request.param == "redis":
        if not has_redis():
            pytest.skip("no redis-server here: apt-get install redis-server")
        server = request.getfixturevalue("redis_server")
        server.client().flushall()
        return server.url
    for name, value in request.getfixturevalue("s3_server").environment.items():
        monkeypatch.setenv(name, value)
    return f"s3://bucket/{tmp_path.name}"


def fill(place, numbers=range(6)):
    """Records of two models and two tenants, of three codecs; returns {key: record}."""
    kept = {}
    for n in numbers:
        model, tenant = (A, B)[n % 2], ("", "anna")[n // 2 % 2]
        record = make(key_of(n))
        if n == 4:
            record = packed(record, parse("zstd"))
        if n == 5:
            record, model = packed(record, KIVI), fingerprint_with(B, KIVI)
        open_store(place, model, tenant=tenant).put(record)
        kept[record.key] = record
    return kept


EVERYTHING = RecordFilter()


def keys(catalog, selection=EVERYTHING):
    return {entry.key for entry in selection.of(catalog, details=False)}


# -- what there is -----------------------------------------------------------------------------------------------------


def test_entries_say_whose_records_they_are(place):
    kept = fill(place)
    before = time.time()
    catalog = open_catalog(place)
    entries = {entry.key: entry for entry in catalog.entries()}
    assert entries.keys() == kept.keys()
    for n in range(6):
        entry, record = entries[key_of(n)], kept[key_of(n)]
        assert entry.fingerprint == (fingerprint_with(B, KIVI) if n == 5 else (A, B)[n % 2])
        assert entry.tenant == tenant_id(("", "anna")[n // 2 % 2]) and entry.tokens == len(record)
        assert entry.codec == ("zstd" if n == 4 else "kivi" if n == 5 else "raw")
        assert entry.size == catalog.read(entry).numel() and not entry.pinned
        assert before - 60 < entry.used < before + 60
    found = {(s.model, s.tenant, s.codec): (s.records, s.bytes) for s in shares(catalog, RecordFilter())}
    assert sum(n for n, _ in found.values()) == 6 and len(found) == 6
    assert keys(catalog, RecordFilter(A[:8])) == {key_of(n) for n in (0, 2, 4)}
    assert (
        keys(catalog, RecordFilter(tenant="anna"))
        == keys(catalog, RecordFilter(tenant=tenant_id("anna")))
        == {key_of(2), key_of(3)}
    )
    assert keys(catalog, RecordFilter(A, "")) == {key_of(0), key_of(4)} and not keys(catalog, RecordFilter("c"))


def test_looking_is_no_use(place, tmp_path):
    """Whoever lists a store every hour must not keep its records from growing old."""
    if place.startswith("s3"):
        pytest.skip("object stores only know when a record was written")
    fill(place, range(1))
    time.sleep(2.1)  # Redis knows idle times in seconds
    catalog = open_catalog(place)
    first = next(iter(catalog.entries()))
    second = next(iter(catalog.entries()))
    assert first.used <= time.time() - 1 and second.used <= time.time() - 1
    open_store(place, A).get(key_of(0))
    if not place.startswith("redis"):
        return  # a folder's uses are noted now and then
    assert next(iter(catalog.entries())).used > first.used


def test_nothing_else_in_a_place_is_seen_or_touched(place, tmp_path, request):
    """Foreign objects beside ours, also ones that nearly look like them."""
    fill(place)
    space = f"{A}/all"
    if place.startswith("redis"):
        client = request.getfixturevalue("redis_server").client()
        names = ["mine", f"kvgraph:x:all:r:{key_of(9)}", f"kvgraph:{A}:all:r:short", f"other:{A}:all:r:{key_of(0)}"]
        for name in names:
            client.set(name, "1 2")
        left = lambda: {name for name in names if client.get(name) == b"1 2"}  # noqa: E731
    elif place.startswith("s3"):
        client = request.getfixturevalue("s3_server").client()
        prefix = place.removeprefix("s3://bucket/")
        names = [
            f"{prefix}/mine",
            f"{prefix}/x/all/{key_of(9)}",
            f"{prefix}/{space}/notes.txt",
            f"{prefix}-2/{space}/{key_of(0)}",
        ]
        for name in names:
            client.put_object(Bucket="bucket", Key=name, Body=b"x")
        left = lambda: {  # noqa: E731
            name for name in names if client.get_object(Bucket="bucket", Key=name)["Body"].read() == b"x"
        }
    else:
        folder = tmp_path / "kv"
        names = ["mine", "records/aa/notes.txt", f"records/{key_of(9)[:2]}/.hidden"]
        for name in names:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text("x")
        left = lambda: {name for name in names if (folder / name).read_text() == "x"}  # noqa: E731
    catalog = open_catalog(place)
    assert keys(catalog) == {key_of(n) for n in range(6)}
    assert catalog.verify().clean
    assert len(catalog.remove(list(catalog.entries()))) == 6
    assert not keys(catalog) and left() == set(names)


# -- what goes ---------------------------------------------------------------------------------------------------------


def entry(n, size=10, used=0.0, pinned=False, tenant=""):
    return Entry(key_of(n), size, used or 0.0, used, pinned, 1, A, "raw", tenant)


def test_garbage_is_old_then_over_quota_then_over_the_cap():
    entries = [entry(n, used=float(n), tenant="xy"[n % 2]) for n in range(10)]
    random.Random(0).shuffle(entries)

    def gone(**limits):
        return [next(n for n in range(10) if key_of(n) == victim.key) for victim in garbage(entries, 10.0, **limits)]

    assert gone(older_than=7.5) == [0, 1, 2]
    assert gone(max_bytes=70) == [0, 1, 2] and gone(max_bytes=75) == [0, 1, 2] and gone(max_bytes=100) == []
    assert gone(quota=30) == [0, 1, 2, 3] and gone(quota=50) == []
    assert gone(quota=40, max_bytes=70) == [0, 1, 2]
    assert gone(older_than=8.5, quota=40, max_bytes=80) == [0, 1]
    assert gone(max_bytes=1) == list(range(10))


def test_pinned_records_count_and_stay():
    entries = [entry(n, used=float(n), pinned=n in (0, 3)) for n in range(5)]
    assert [victim.key for victim in garbage(entries, 9.0, max_bytes=20)] == [key_of(1), key_of(2), key_of(4)]
    assert not any(victim.pinned for victim in garbage(entries, 99.0, older_than=1, quota=1, max_bytes=1))


def test_a_place_that_knows_no_uses_is_not_cleaned():
    with pytest.raises(StoreError, match="doesn't know when its records were used"):
        garbage([entry(1, used=None)], 0.0, max_bytes=1)


def test_what_is_pinned_meanwhile_stays(place):
    fill(place)
    catalog = open_catalog(place)
    entries = list(catalog.entries(details=False))
    held = find(catalog, key_of(2)[:6], entries)
    open_catalog(place).set_pinned(held, True)
    open_catalog(place).set_pinned(held, True)
    assert [e.key for e in catalog.entries() if e.pinned] == [held.key]
    seen = []
    removed = catalog.remove(entries, lambda: seen.append(1))
    assert {e.key for e in removed} == {e.key for e in entries} - {held.key} and len(seen) == 6
    catalog.set_pinned(held, False)
    catalog.set_pinned(held, False)
    assert len(catalog.remove([held])) == 1 and not keys(catalog)


@pytest.mark.parametrize("prefix", ["", "abc", "xyzw", "A" * 8, "../..", "f" * 65])
def test_what_is_no_beginning_of_a_key(prefix, tmp_path):
    with pytest.raises(StoreError, match="isn't the beginning of a key"):
        find(DiskStore(tmp_path), prefix, [])


# -- what is wrong -----------------------------------------------------------------------------------------------------


def test_verify_reports_and_repair_takes_away(place, tmp_path):
    kept = fill(place)
    catalog = open_catalog(place)
    entries = {e.key: e for e in catalog.entries()}
    bad = entries[key_of(0)]
    data = bytearray(catalog.read(bad).numpy().tobytes())
    data[-1] ^= 1
    catalog.remove([bad])
    assert catalog.keep(bad, [bytes(data)])
    for _ in range(2):
        report = catalog.verify(repair=False)
        assert [key for key, _ in report.bad] == [bad.key] and report.good == 5 and not report.clean
    seen = []
    assert not catalog.verify(repair=True, seen=lambda: seen.append(1)).clean and len(seen) == 6
    assert catalog.verify(repair=False).clean and keys(catalog) == kept.keys() - {bad.key}


@pytest.mark.skipif(not has_redis(), reason="no redis-server here: apt-get install redis-server")
def test_parts_without_a_record_are_leftovers(redis_server):
    client = redis_server.client()
    client.flushall()
    for n, tenant in ((1, ""), (2, ""), (3, "anna")):
        open_store(redis_server.url, A, tenant=tenant).put(make(key_of(n)))
    (mine,) = client.scan_iter(match=f"*:p:{key_of(1)}:*")
    kept = {mine, f"kvgraph:{A}:all:r:{key_of(1)}".encode(), f"kvgraph:{A}:all:p:foreign".encode()}
    writing = f"kvgraph:{A}:all:p:{key_of(4)}:0123:0".encode()
    client.set(writing, b"x", px=600_000)
    client.set(f"kvgraph:{A}:all:p:foreign", b"x")
    client.set(f"kvgraph:{A}:all:p:{key_of(1)}:0123:0", b"x")  # of a record that was replaced
    client.delete(*client.scan_iter(match=f"*:r:{key_of(2)}"), *client.scan_iter(match=f"*:r:{key_of(3)}"))
    before, catalog = set(client.scan_iter()), open_catalog(redis_server.url)
    assert catalog.verify(repair=False).temporary == 3 and set(client.scan_iter()) == before
    report = catalog.verify()
    assert report.temporary == 3 and report.good == 1 and report.clean
    assert set(client.scan_iter()) == kept | {writing}
    assert catalog.verify().temporary == 0


# -- what arrives elsewhere --------------------------------------------------------------------------------------------


def test_an_export_is_loaded_by_another_store(place, tmp_path):
    kept = fill(place)
    source, file = open_catalog(place), tmp_path / "some.kvgraph"
    done = archive.export(source, RecordFilter(A).of(source), file)
    assert (done.records, done.refused) == (3, []) and archive.count(file) == 3
    target = DiskStore(tmp_path / "other")
    assert archive.import_(file, target, A[:8]).records == 3
    again = archive.import_(file, target, A)
    assert (again.records, again.there) == (0, 3)
    assert target.verify().clean and keys(target) == {key_of(n) for n in (0, 2, 4)}
    for n, tenant in ((0, ""), (2, "anna"), (4, "")):
        assert same(got(open_store(tmp_path / "other", A, tenant=tenant), key_of(n)), kept[key_of(n)])
    with pytest.raises(StoreError, match="exists; give another name"):
        archive.export(source, [], file)


def test_an_export_is_refused_by_another_model_before_anything_is_written(place, tmp_path):
    fill(place)
    source, file = open_catalog(place), tmp_path / "all.kvgraph"
    archive.export(source, list(source.entries()), file)
    target = DiskStore(tmp_path / "other")
    for model in (A, B, "c" * 64, "abcdef01"):
        with pytest.raises(StoreError, match="holds records of the model with fingerprint"):
            archive.import_(file, target, model)
    assert not target.ls()
    only = tmp_path / "b.kvgraph"  # model B, raw and under a lossy codec
    archive.export(source, [e for e in source.entries() if e.key in (key_of(1), key_of(5))], only)
    assert archive.import_(only, target, B).records == 2


def written(file, *members):
    with tarfile.open(file, "w") as tar:
        for name, data, kind in members:
            info = tarfile.TarInfo(name)
            info.size, info.type = len(data), kind
            info.linkname = "/etc/passwd" if kind != tarfile.REGTYPE else ""
            tar.addfile(info, io.BytesIO(data))


def contents(**changed):
    fields = {"format": archive.FORMAT, "records": 1, "models": [{"fingerprint": A, "codec": "raw"}]}
    return (archive.CONTENTS, json.dumps(fields | changed).encode(), tarfile.REGTYPE)


RECORD = b"".join(format.encode(make(key_of(1)), A))
HOSTILE = {
    "a path": (f"../../{key_of(1)}.safetensors", RECORD, tarfile.REGTYPE),
    "an absolute path": (f"/{A}/all/{key_of(1)}.safetensors", RECORD, tarfile.REGTYPE),
    "another key": (f"{A}/all/{key_of(2)}.safetensors", RECORD, tarfile.REGTYPE),
    "another model": (f"{B}/all/{key_of(1)}.safetensors", RECORD, tarfile.REGTYPE),
    "no model": (f"any/all/{key_of(1)}.safetensors", RECORD, tarfile.REGTYPE),
    "a link": (f"{A}/all/{key_of(1)}.safetensors", b"", tarfile.SYMTYPE),
    "a hard link": (f"{A}/all/{key_of(1)}.safetensors", b"", tarfile.LNKTYPE),
    "a device": (f"{A}/all/{key_of(1)}.safetensors", b"", tarfile.CHRTYPE),
    "damaged": (f"{A}/all/{key_of(1)}.safetensors", RECORD[:-1] + b"x", tarfile.REGTYPE),
    "shorter": (f"{A}/all/{key_of(1)}.safetensors", RECORD[:-1], tarfile.REGTYPE),
    "empty": (f"{A}/all/{key_of(1)}.safetensors", b"", tarfile.REGTYPE),
    "unsigned for a tenant": (f"{A}/{'0' * 15}/{key_of(1)}.safetensors", RECORD, tarfile.REGTYPE),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_record_of_an_export_is_left_out(name, tmp_path):
    file, target = tmp_path / "hostile.kvgraph", DiskStore(tmp_path / "kv")
    good = (f"{A}/all/{key_of(1)}.safetensors", RECORD, tarfile.REGTYPE)
    written(file, contents(), HOSTILE[name], good)
    before = sorted(p for p in tmp_path.rglob("*"))
    done = archive.import_(file, target, A)
    assert len(done.refused) == 1 and done.records == 1
    new = {p for p in tmp_path.rglob("*")} - set(before)
    assert [p.name for p in new if p.suffix == ".safetensors"] == [f"{key_of(1)}.safetensors"]
    assert same(got(open_store(tmp_path / "kv", A), key_of(1)), make(key_of(1)))


@pytest.mark.parametrize(
    "first",
    [
        contents(format="kvgraph-export 99"),
        contents(records="x"),
        contents(models=[{"fingerprint": 1}]),
        (archive.CONTENTS, b"[" * 100_000, tarfile.REGTYPE),
        (archive.CONTENTS, b"x", tarfile.REGTYPE),
        ("else", b"{}", tarfile.REGTYPE),
    ],
)
def test_a_file_that_is_no_export_is_refused(first, tmp_path):
    file = tmp_path / "f"
    written(file, first)
    with pytest.raises(StoreError, match=r"isn't an export|reads 'kvgraph-export 1'") as error:
        archive.import_(file, DiskStore(tmp_path / "kv"), A)
    assert "\n" not in str(error.value)
    for text in (b"", b"x" * 5000):
        file.write_bytes(text)
        with pytest.raises(StoreError, match="isn't an export"):
            archive.count(file)
    with pytest.raises(StoreError, match="No such file"):
        archive.count(tmp_path / "none")


def test_a_truncated_export_gives_what_was_whole(tmp_path):
    store = DiskStore(tmp_path / "a", fingerprint=A)
    for n in range(4):
        store.put(make(key_of(n)))
    file, target = tmp_path / "f", DiskStore(tmp_path / "b")
    archive.export(store, list(store.entries()), file)
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])
    with pytest.raises(StoreError, match="is damaged"):
        archive.import_(file, target, A)
    assert target.verify().clean and 0 < len(target.ls()) < 4


def test_records_move_between_places_and_codecs(place, tmp_path):
    kept = fill(place)
    source, target = open_catalog(place), DiskStore(tmp_path / "other")
    done = migrate(source, target, RecordFilter(A).of(source), parse("zstd"))
    assert (done.records, done.there, done.refused) == (3, 0, [])
    assert {e.codec for e in target.ls()} == {"zstd"} and target.verify().clean
    for n, tenant in ((0, ""), (2, "anna"), (4, "")):
        assert same(got(open_store(tmp_path / "other", A, tenant=tenant), key_of(n)), kept[key_of(n)])
    source.set_pinned(find(source, key_of(1), list(source.entries())), True)
    done = migrate(source, target, RecordFilter().of(source), move=True)
    assert (done.records, done.there) == (3, 3)
    assert keys(source) == {key_of(1)}, "a pinned record stays where it was pinned"
    assert [e.key for e in target.ls() if e.pinned] == [key_of(1)]
    back = migrate(target, source, [e for e in target.entries() if e.key != key_of(1)])
    assert back.records == 5 and source.verify().clean and keys(source) == kept.keys()


def test_records_are_packed_anew_where_they_are(place):
    kept = fill(place)
    catalog = open_catalog(place)
    held = find(catalog, key_of(2), list(catalog.entries()))
    catalog.set_pinned(held, True)
    assert migrate(catalog, catalog, RecordFilter(A).of(catalog), parse("zstd:level=1")).records == 3
    entries = {e.key: e for e in catalog.entries() if e.fingerprint == A}
    assert {e.codec for e in entries.values()} == {"zstd:level=1"} and entries[key_of(2)].pinned
    assert same(got(open_store(place, A), key_of(0)), kept[key_of(0)]) and catalog.verify().clean


@pytest.mark.parametrize(
    ("old", "new"), [("raw", "int8"), ("int8", "raw"), ("kivi", "kivi:bits=2"), ("kivi+zstd", "zstd")]
)
def test_a_codec_that_loses_something_is_no_migration(old, new, tmp_path):
    record = make(key_of(1))
    with pytest.raises(StoreError, match=f"kept as .* can't become {new}.*encode the documents again"):
        repacked(record if old == "raw" else packed(record, parse(old)), parse(new))


@pytest.mark.parametrize(
    ("old", "new"), [("raw", "zstd"), ("zstd", "raw"), ("kivi", "kivi+zstd"), ("gear+zstd", "gear")]
)
def test_packing_anew_is_packing(old, new):
    """The bytes are those of a record that was packed so from the beginning."""
    record = make(key_of(1))
    there, wanted = (packed(record, parse(spec)) if spec != "raw" else record for spec in (old, new))
    made = repacked(there, parse(new))
    assert same(made, wanted) and b"".join(format.encode(made, A)) == b"".join(format.encode(wanted, A))


def test_a_damaged_record_is_not_taken_along(tmp_path):
    source = DiskStore(tmp_path / "a", fingerprint=A)
    for n in range(2):
        source.put(make(key_of(n)))
    file = next((tmp_path / "a").glob(f"records/*/{key_of(0)}.safetensors"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    for target in (DiskStore(tmp_path / "b"), source):
        done = migrate(source, target, list(source.entries()), parse("zstd"))
        assert [key for key, _ in done.refused] == [key_of(0)] and done.records == 1
    assert not archive.export(source, list(source.entries()), tmp_path / "f").refused[1:]
