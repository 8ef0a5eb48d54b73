"""Every codec that is registered, and how a new one joins."""

import json
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import installed
from by_hand import sealed
from kvgraph.errors import StoreError
from kvgraph.store import DiskStore, MemoryStore, Record, TieredStore, format
from kvgraph.store.codecs.raw import Raw
from kvgraph.store.codecs.registry import CODECS, fingerprint_with, packed, parse, spec_of
from kvgraph.store.record import BadRecord, UnsupportedRecord
from soak import draws
from store_worker import got, key_of, same

MORE = ["kivi:bits=2,group=32,residual=16", "kivi:group=7,residual=400", "gear:bits=2,rank=2", "gear:outliers=300"]
MORE += ["kivi+zstd", "fp8+zstd:level=9", "zstd:level=1"]
SPECS = [*CODECS, *MORE]
SMALLER = {
    "fp8": 1.9,
    "int8": 1.9,
    "kivi": 3.5,
    "kivi:bits=2": 6.0,
    "gear": 2.2,
    "zstd": 1.05,
}  # than bf16, on real sizes


def normal(n=300, heads=2, dims=(32, 24), layers=2, dtype=torch.float32, seed=0, outlier=1.0) -> Record:
    """KV as real ones are: one channel of the keys is `outlier` times as large as the others."""
    draw = torch.Generator().manual_seed(seed)
    keys = [torch.randn(heads, n, dims[0], generator=draw) for _ in range(layers)]
    for k in keys:
        k[:, :, 3 % dims[0]] = (k[:, :, 3 % dims[0]] + 4) * outlier
    values = [torch.randn(heads, n, dims[1], generator=draw) for _ in range(layers)]
    kv = [tuple(t.to(dtype) for t in side) for side in (keys, values)]
    return Record(key_of(seed), *kv, torch.arange(n))


def size(record: Record) -> int:
    return sum(len(part) for part in format.encode(record))


def read(data: bytes, key: str, **options) -> Record:
    return format.decode(torch.frombuffer(bytearray(data), dtype=torch.uint8), key, **options)


@pytest.mark.parametrize("spec", SPECS)
def test_a_codecs_text_is_read_as_the_codec(spec):
    assert spec_of(parse(spec)) == spec and parse(spec_of(parse(spec))) == parse(spec)
    assert parse(f" {spec} ") == parse(spec)


@settings(max_examples=draws(60), deadline=None)
@given(
    st.sampled_from(SPECS),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    st.integers(1, 90),
    st.integers(1, 3),
    st.tuples(st.integers(1, 33), st.integers(1, 33)),
    st.integers(0, 1 << 20),
)
def test_what_is_read_is_what_the_codec_made(spec, dtype, n, heads, dims, seed):
    """Of any shape, in every dtype: the bytes give back exactly what `packed` said, and the same bytes again."""
    codec, record = parse(spec), normal(n, heads, dims, 1, dtype, seed)
    kept = packed(record, codec)
    data = b"".join(format.encode(kept, "model"))
    found = read(data, record.key, fingerprint="model")
    assert same(found, kept) and found.keys[0].dtype == dtype
    assert all(t.is_contiguous() for r in (kept, found) for t in (*r.keys, *r.values)), (
        "attention reads them as they lie"
    )
    assert b"".join(format.encode(found, "model")) == data  # so it can go from tier to tier
    if codec.lossless:
        assert same(found, record)


def half_step(x: torch.Tensor, axis: int, bits: int) -> float:
    """Half a step of quantising the range along an axis, and what float16 may move its ends."""
    x = x.float()
    return float((x.amax(axis) - x.amin(axis)).max()) / ((1 << bits) - 1) / 2 * 1.001 + float(x.abs().max()) * 2**-9


BOUNDS = {
    "fp8": lambda x, axis: x.float().abs() / 16 + 1e-3,
    "int8": lambda x, axis: float(x.float().abs().amax(1).max()) / 127 / 2 * 1.001,
    "kivi": lambda x, axis: half_step(x, axis, 4),
    "kivi:bits=2,group=32,residual=16": lambda x, axis: half_step(x, axis, 2),
    # Outliers taken out, steps are smaller; but the correction may move single numbers the wrong way.
    "gear": lambda x, axis: 1.5 * half_step(x, axis, 4),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spec", BOUNDS)
def test_a_codec_errs_as_little_as_its_bits_allow(spec, dtype):
    record = normal(dtype=dtype)
    kept = packed(record, parse(spec))
    for axis, side in ((1, "keys"), (2, "values")):
        for x, y in zip(getattr(record, side), getattr(kept, side), strict=True):
            rounding = 0 if dtype == torch.float32 else 2**-8 * x.float().abs()
            wrong = (x.float() - y.float()).abs()
            assert float(wrong.max()) > 0 and (wrong <= BOUNDS[spec](x, axis) + rounding).all()


def test_outlier_channels_cost_their_neighbours_nothing():
    """Why keys are quantised per channel: one channel in a hundred times the others' size must not coarsen them."""
    calm, wild = normal(outlier=1.0), normal(outlier=100.0)
    for spec in ("int8", "kivi", "gear"):
        others = [c for c in range(32) if c != 3]
        a, b = (packed(r, parse(spec)).keys[0][:, :, others] - r.keys[0][:, :, others] for r in (calm, wild))
        assert float(b.abs().max()) < 1.2 * float(a.abs().max())


def test_gear_is_closer_than_kivi():
    record = normal()
    for bits in (2, 4):
        kivi, gear = (packed(record, parse(f"{name}:bits={bits}")) for name in ("kivi", "gear"))
        for side in ("keys", "values"):
            exact = getattr(record, side)[0]
            far, near = (float((getattr(r, side)[0] - exact).norm()) for r in (kivi, gear))
            assert near < 0.85 * far


@pytest.mark.parametrize("spec", SMALLER)
def test_a_codec_is_as_small_as_it_says(spec):
    record = normal(512, 2, (128, 128), 2, torch.bfloat16)
    assert size(record) / size(packed(record, parse(spec))) > SMALLER[spec]


def test_residual_tokens_stay_as_they_are():
    record = normal(n=50)
    kept = packed(record, parse("kivi:bits=2,residual=16"))
    assert torch.equal(kept.keys[0][:, -16:], record.keys[0][:, -16:])
    assert not torch.equal(kept.keys[0][:, :-16], record.keys[0][:, :-16])
    assert same(packed(record, parse("kivi:residual=50")), record)


@pytest.mark.parametrize("spec", ["kivi:bits=2", "gear", "int8+zstd"])
def test_a_record_stays_the_same_from_tier_to_tier(spec, tmp_path):
    record = packed(normal(), parse(spec))
    first, second, memory = DiskStore(tmp_path / "a"), DiskStore(tmp_path / "b"), MemoryStore(10**9)
    second.put(record)
    tiers = TieredStore([memory, first, second])
    assert tiers.get(record.key)[1] == "disk"
    tiers.flush()
    for store in (memory, first, second):
        assert same(got(store, record.key), record)
    files = [next((tmp_path / folder / "records").glob("*/*")).read_bytes() for folder in "ab"]
    assert files[0] == files[1] and [e.codec for e in first.ls()] == [spec]


def test_only_lossy_codecs_change_the_fingerprint():
    prints = {spec: fingerprint_with("m", parse(spec)) for spec in SPECS}
    assert {spec for spec, found in prints.items() if found == "m"} == {"raw", "zstd", "zstd:level=1"}
    assert prints["kivi+zstd"] == prints["kivi"] and prints["fp8+zstd:level=9"] == prints["fp8"]
    assert len(set(prints.values())) == 1 + len({"fp8", "int8", "kivi", "gear", *MORE[:4]})


@settings(max_examples=draws(150), deadline=None)
@given(st.sampled_from([s for s in SPECS if s != "raw"]), st.data())
def test_hostile_records_are_refused(spec, data):
    """A header, a shape or bytes changed at will under a right checksum: refused, or finite KV of the tokens it states."""
    record = packed(normal(20, 2, (8, 6), 1), parse(spec))
    whole = b"".join(format.encode(record))
    length = int.from_bytes(whole[:8], "little")
    header, payload = json.loads(whole[8 : 8 + length]), bytearray(whole[8 + length :])
    change = data.draw(st.sampled_from(["bytes", "drop", "shape", "dtype", "meta"]))
    names = [n for n in header if n not in ("__metadata__", "positions")]
    name = data.draw(st.sampled_from(names))
    if change == "bytes":
        start, end = header[name]["data_offsets"]
        for at in data.draw(st.lists(st.integers(start, end - 1), min_size=1, max_size=8)):
            payload[at] = data.draw(st.integers(0, 255))
    elif change == "drop":
        header = {("other" if n == name else n): line for n, line in header.items()}
    elif change == "shape":
        header[name]["shape"] = data.draw(st.permutations(header[name]["shape"]))
    elif change == "dtype":
        header[name]["dtype"] = data.draw(st.sampled_from(["U8", "I8", "F16", "I16", "F32"]))
    else:
        field = data.draw(st.sampled_from(["codec", "dtype", "tokens"]))
        header["__metadata__"][field] = data.draw(st.sampled_from([*SPECS, "F16", "I8", "", "19", "21"]))
    try:
        found = read(sealed(header, bytes(payload)), record.key)
    except (BadRecord, UnsupportedRecord):
        return
    assert len(found) == int(header["__metadata__"]["tokens"])
    assert all(t.shape[1] == len(found) and t.isfinite().all() for t in (*found.keys, *found.values))


def test_a_small_frame_that_claims_to_be_huge_is_refused():
    record = packed(normal(20, 2, (8, 6), 1), parse("zstd"))
    table = json.loads(record.packed.tensors["table"].numpy().tobytes())
    table["keys.0"][1] = [1 << 20, 20, 1 << 20]
    text = torch.frombuffer(bytearray(json.dumps(table).encode()), dtype=torch.uint8)
    tensors = {**record.packed.tensors, "table": text}
    with pytest.raises(BadRecord, match="another size"):
        parse("zstd").unpack(tensors, 20, torch.float32)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_numbers_that_are_none_are_neither_kept_nor_served(number, tmp_path):
    record = normal(5)
    whole = b"".join(format.encode(record))
    record.values[1][0, 2, 1] = number
    with pytest.raises(StoreError, match="NaN or infinite"):
        DiskStore(tmp_path).put(record)
    length = int.from_bytes(whole[:8], "little")
    header, payload = json.loads(whole[8 : 8 + length]), bytearray(whole[8 + length :])
    payload[:4] = torch.tensor(number).numpy().tobytes()
    with pytest.raises(BadRecord, match="finite"):
        read(sealed(header, bytes(payload)), record.key)


@dataclass(frozen=True)
class Negated:
    """A toy: keys and values with their sign turned, and a mark."""

    mark: int = 1

    name: ClassVar[str] = "negated"
    lossless: ClassVar[bool] = True

    def pack(self, record):
        return {n: -t for n, t in Raw().pack(record).items()} | {"mark": torch.tensor([self.mark], dtype=torch.int32)}

    def unpack(self, tensors, tokens, dtype):
        assert tensors["mark"].tolist() == [self.mark]
        return Raw().unpack({n: -t for n, t in tensors.items() if n != "mark"}, tokens, dtype)


@pytest.fixture
def toy(monkeypatch, tmp_path_factory):
    """The toy as another package's codec."""
    folder = tmp_path_factory.mktemp("package")
    installed.declare(folder, "toy", f"[{CODECS.group}]\nnegated = {__name__}:Negated\n")
    monkeypatch.syspath_prepend(str(folder))
    with installed.looked_up_again([CODECS]):
        yield


def test_a_toy_codec_joins_by_one_line(toy, monkeypatch, tmp_path):
    record = normal()
    store = DiskStore(tmp_path)
    store.put(packed(record, parse("negated:mark=7")))
    assert same(got(DiskStore(tmp_path), record.key), record)
    assert [e.codec for e in store.ls()] == ["negated:mark=7"] and store.verify().clean
    monkeypatch.undo()
    with installed.looked_up_again([CODECS]):
        fresh = DiskStore(tmp_path)
        assert fresh.get(record.key) is None and fresh.counts()["unreadable"] == 1
        assert fresh.verify().unsupported and fresh.contains(record.key)  # left alone


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("gzip", "no codec 'gzip'; there are raw, fp8"),
        ("zstd+kivi", "only zstd can follow another codec"),
        ("kivi+zstd+zstd", "no codec|gains nothing"),
        ("kivi:bits=3", "bits 2 or 4"),
        ("gear:outliers=500", "1 to 499"),
        ("zstd:level=23", "level from 1 to 22"),
        ("raw:bits=4", "codec raw has no field 'bits'"),
        ("", "no codec ''"),
        ("negated:mark=", "is a whole number, not ''"),
        ("negated:mark=-1", "is a whole number, not '-1'"),
        ("negated:mark=1e3", "is a whole number"),
    ],
)
def test_what_is_no_codec_is_refused(text, says, toy):
    with pytest.raises(StoreError, match=says):
        parse(text)


def test_a_stores_url_of_an_unknown_kind_is_refused():
    from kvgraph.store import open_store

    with pytest.raises(StoreError, match="no kind of store 'ftp'; give a folder"):
        open_store("ftp://somewhere/x", "m")
    with pytest.raises(StoreError, match="at least one"):
        open_store([], "m")
