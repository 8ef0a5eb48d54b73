"""Every codec that is registered, and how a new one joins."""

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch

from kvgraph.errors import StoreError
from kvgraph.store import DiskStore, format
from kvgraph.store.codecs.raw import Raw
from kvgraph.store.codecs.registry import CODECS, parse, spec_of
from store_worker import got, key_of, make, same


def cast(record, dtype):
    return replace(
        record, keys=tuple(k.to(dtype) for k in record.keys), values=tuple(v.to(dtype) for v in record.values)
    )


@pytest.mark.parametrize("name", CODECS)
def test_a_codecs_text_is_read_as_the_codec(name):
    codec = CODECS[name]()
    assert parse(name) == codec and parse(spec_of(codec)) == codec and spec_of(codec) == name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", CODECS)
def test_what_is_read_is_what_was_written(name, dtype, tmp_path):
    codec, record = CODECS[name](), cast(make(key_of(1)), dtype)
    DiskStore(tmp_path, codec=codec).put(record)
    for store in (DiskStore(tmp_path), DiskStore(tmp_path, codec=Raw())):  # a record says which codec it needs
        found = got(store, record.key)
        assert same(found, record)
    assert [e.codec for e in DiskStore(tmp_path).ls()] == [spec_of(codec)]


@dataclass(frozen=True)
class Negated:
    """A toy: keys and values with their sign turned, and a mark."""

    mark: int = 1

    name: ClassVar[str] = "negated"
    lossless: ClassVar[bool] = True

    def pack(self, record):
        return {n: -t for n, t in Raw().pack(record).items()} | {"mark": torch.tensor([self.mark], dtype=torch.int32)}

    def check(self, tensors, tokens):
        Raw().check({n: info for n, info in tensors.items() if n != "mark"}, tokens)

    def unpack(self, tensors, tokens):
        assert tensors["mark"].tolist() == [self.mark]
        return Raw().unpack({n: -t for n, t in tensors.items() if n != "mark"}, tokens)


def test_a_toy_codec_joins_by_one_line(monkeypatch, tmp_path):
    record = make(key_of(1))
    monkeypatch.setitem(CODECS, "negated", Negated)
    store = DiskStore(tmp_path, codec=parse("negated:mark=7"))
    store.put(record)
    assert same(got(DiskStore(tmp_path), record.key), record)
    assert [e.codec for e in store.ls()] == ["negated:mark=7"] and store.verify().clean
    monkeypatch.delitem(CODECS, "negated")
    fresh = DiskStore(tmp_path)
    assert fresh.get(record.key) is None and fresh.counts()["unreadable"] == 1
    assert fresh.verify().unsupported and fresh.contains(record.key)  # left alone


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("gzip", "no codec 'gzip'; there are raw"),
        ("raw:bits=4", "codec raw has no field 'bits'"),
        ("", "no codec ''"),
        ("negated:mark=", "is a whole number, not ''"),
        ("negated:mark=-1", "is a whole number, not '-1'"),
        ("negated:mark=1e3", "is a whole number"),
    ],
)
def test_what_is_no_codec_is_refused(text, says, monkeypatch):
    monkeypatch.setitem(CODECS, "negated", Negated)
    with pytest.raises(StoreError, match=says):
        parse(text)


def test_a_stores_url_of_an_unknown_kind_is_refused():
    from kvgraph.store import open_store

    with pytest.raises(StoreError, match="no kind of store 'ftp'; give a folder"):
        open_store("ftp://somewhere/x", "m")
    with pytest.raises(StoreError, match="at least one"):
        open_store([], "m")


def test_raw_bytes_dont_depend_on_the_seam():
    record = make(key_of(2))
    assert b"".join(format.encode(record)) == b"".join(format.encode(record, codec=parse("raw")))
