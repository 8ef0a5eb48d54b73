"""The record file: round trips, alignment, other readers, hostile bytes, and the documented decoder."""

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from by_hand import sealed, taken_apart
from kvgraph.errors import StoreError
from kvgraph.plan import Group, Place, Plan, Span
from kvgraph.store import Record
from kvgraph.store import format as codec
from kvgraph.store.format import BadRecord, UnsupportedRecord
from soak import draws
from store_worker import key_of, same

DOC = Path(__file__).parents[2] / "docs" / "reference" / "format.md"
KEY = key_of(7)


def record(dtype=torch.float32, layers=2, heads=2, tokens=3, size=4, key=KEY) -> Record:
    generator = torch.Generator().manual_seed(layers + tokens)

    def draw():
        return torch.randn(heads, tokens, size, generator=generator).to(dtype)

    keys, values = ([draw() for _ in range(layers)] for _ in range(2))
    return Record(key, tuple(keys), tuple(values), torch.arange(tokens))


def file_of(r: Record, fingerprint: str = "") -> bytes:
    return b"".join(codec.encode(r, fingerprint))


def decode(data: bytes, key: str = KEY, **options) -> Record:
    return codec.decode(torch.frombuffer(bytearray(data), dtype=torch.uint8), key, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 7), (2, 30, 64)])
def test_round_trip(dtype, shape):
    r = record(dtype, 3, *shape)
    data = file_of(r, "model")
    assert same(decode(data, fingerprint="model"), r)
    assert same(decode(data, verify=False), r)


def test_layers_may_differ_and_tensors_may_be_views():
    """Keys and values of other shapes, non-contiguous (a prefix of a growing buffer), positions with gaps."""
    buffers = [torch.randn(2, 16, d) for d in (4, 8, 6, 2)]
    r = Record(KEY, tuple(b[:, :5] for b in buffers[:2]), tuple(b[:, :5] for b in buffers[2:]), torch.arange(5) * 3)
    assert same(decode(file_of(r)), r)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_safetensors_reads_it(tmp_path, dtype):
    r = record(dtype, 11, 2, 9, 8)
    path = tmp_path / "r.safetensors"
    path.write_bytes(file_of(r, "model"))
    with safetensors.safe_open(path, "pt") as file:
        assert file.metadata()["key"] == KEY and file.metadata()["fingerprint"] == "model"
        for layer in range(11):
            assert torch.equal(file.get_tensor(f"keys.{layer}"), r.keys[layer])
            assert torch.equal(file.get_tensor(f"values.{layer}"), r.values[layer])
        assert torch.equal(file.get_tensor("positions"), r.positions)


def test_reading_is_aligned_and_copies_nothing(tmp_path):
    path = tmp_path / "r.safetensors"
    path.write_bytes(file_of(record(size=32)))
    data, info = codec.map_file(path)
    r = codec.decode(data, KEY)
    assert data.data_ptr() <= r.keys[0].data_ptr() < data.data_ptr() + info.st_size
    assert all(t.data_ptr() % 64 == 0 for t in (*r.keys, *r.values))
    copy = r.keys[1].clone()
    path.unlink()
    del data
    assert torch.equal(r.keys[1], copy)


def test_every_flipped_bit_is_noticed():
    """Of the length, the header, its padding and the data: nothing in the file is outside the checksum's reach."""
    data = bytearray(file_of(record(torch.bfloat16, 1, 1, 2, 4)))
    for i in range(len(data)):
        for bit in range(8):
            data[i] ^= 1 << bit
            with pytest.raises((BadRecord, UnsupportedRecord)):
                decode(data)
            data[i] ^= 1 << bit
    assert decode(data).key == KEY


@pytest.mark.parametrize("verify", [True, False])
def test_every_truncation_is_noticed(verify):
    data = file_of(record(layers=1))
    for length in [*range(len(data)), len(data) + 1, len(data) + 64]:
        with pytest.raises(BadRecord):
            decode((data + bytes(64))[:length] or b"\0", verify=verify)


def test_wrong_key_and_wrong_model_are_bad():
    data = file_of(record(), "one")
    with pytest.raises(BadRecord, match=KEY):
        decode(data, key_of(8))
    with pytest.raises(BadRecord, match="fingerprint one"):
        decode(data, fingerprint="two")
    assert decode(data, fingerprint="one") and decode(file_of(record()), fingerprint="two")


def test_int32_positions_are_read():
    header, data = taken_apart(file_of(record()))
    start, end = header["positions"]["data_offsets"]
    header["positions"] = {"dtype": "I32", "shape": [3], "data_offsets": [start, start + 12]}
    positions = np.array([0, 2, 9], "<i4").tobytes()
    assert end == len(data)
    assert decode(sealed(header, data[:start] + positions)).positions.tolist() == [0, 2, 9]
    with pytest.raises(BadRecord, match="ascend"):
        decode(sealed(header, data[:start] + np.array([0, 9, 2], "<i4").tobytes()))


def test_what_this_version_cannot_read_is_refused():
    header, data = taken_apart(file_of(record()))
    line = header.pop("positions")
    per_head = {"dtype": "I32", "shape": [2, 3], "data_offsets": [line["data_offsets"][0], line["data_offsets"][1]]}
    with pytest.raises(BadRecord, match="doesn't hold positions"):
        decode(sealed({**header, "positions.0": per_head}, data))
    other_codec = {**header, "positions": line, "__metadata__": {**header["__metadata__"], "codec": "int3"}}
    with pytest.raises(UnsupportedRecord, match="int3"):
        decode(sealed(other_codec, data))
    with pytest.raises(UnsupportedRecord, match="format"):
        decode(file_of(record()).replace(b'"kvgraph":"1"', b'"kvgraph":"2"'))


WEIRD = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["F32", "I64", 0, 1]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=draws(300), deadline=None)
@given(st.data())
def test_hostile_headers_are_refused(data):
    """Any change of the header, with a right checksum: refused, or it still says what it said."""
    original = record(layers=1)
    header, payload = taken_apart(file_of(original))
    line = data.draw(st.sampled_from(list(header)))
    name = data.draw(st.sampled_from([*header[line], "", "extra"]) | st.text(max_size=5))
    if line == "__metadata__" and name in ("kvgraph", "xxh3_128", "fingerprint"):
        return  # the first two aren't where `sealed` would leave them; a fingerprint may be any text
    if name == "":
        header[line] = data.draw(WEIRD)
    else:
        header[line] = {**header[line], name: data.draw(WEIRD)}
    if line == "__metadata__" and name == "":
        return
    try:
        found = decode(sealed(header, payload))
    except (BadRecord, UnsupportedRecord):
        return
    assert same(found, original)


@pytest.mark.parametrize("size", [0, 1, 56, 1 << 20, (1 << 20) + 56, 2**63, 2**64 - 8])
def test_hostile_header_lengths_are_refused(size):
    header, payload = taken_apart(file_of(record()))
    with pytest.raises(BadRecord):
        decode(sealed(header, payload, size))


def test_deep_and_foreign_files_are_refused():
    deep = codec.PREFIX + b"0" * 32 + b'","a":' + b"[" * 200_000
    deep += b" " * (-(8 + len(deep)) % 64)
    deep = len(deep).to_bytes(8, "little") + deep
    for data in (deep, b"PK\3\4" * 100, b"\x80\x04\x95" * 100, bytes(4096), b"{}"):
        with pytest.raises(BadRecord):
            decode(data, verify=False)


def test_what_the_format_cannot_hold_is_an_error():
    good = record()
    for bad, message in [
        (replace(good, key="../../etc/passwd"), "isn't a record's key"),
        (record(torch.float64), "float64"),
        (replace(good, values=record(torch.float16).values), "float16"),
        (replace(good, positions=torch.arange(4)), "4 positions"),
        (replace(good, keys=(), values=()), "empty"),
    ]:
        with pytest.raises(StoreError, match=message):
            codec.encode(bad)


# -- docs/reference/format.md ------------------------------------------------------------------------------------------


def examples() -> list[str]:
    return re.findall(r"```python\n(.*?)```", DOC.read_text(), re.DOTALL)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_documented_decoder(tmp_path, dtype):
    """The decoder of the document, with numpy alone, gives the tensors of a real record."""
    r = record(dtype, 2, 3, 5, 8)
    (tmp_path / "r.safetensors").write_bytes(file_of(r, "model"))
    decoder = next(e for e in examples() if "def decode" in e)
    program = f"""{decoder}
import sys
assert "torch" not in sys.modules
metadata, tensors = decode("r.safetensors")
assert metadata["fingerprint"] == "model", metadata
np.savez("out.npz", **tensors)
"""
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True)
    found = np.load(tmp_path / "out.npz")
    assert set(found) == {"keys.0", "keys.1", "values.0", "values.1", "positions"}
    for layer in range(2):
        assert np.array_equal(found[f"keys.{layer}"], r.keys[layer].float().numpy())
        assert np.array_equal(found[f"values.{layer}"], r.values[layer].float().numpy())
    assert np.array_equal(found["positions"], r.positions.numpy())


def test_documented_key():
    """The key derivation of the document gives the keys of `kvgraph.plan`."""
    scope: dict = {}
    exec(next(e for e in examples() if "def span_key" in e), scope)
    span_key = scope["span_key"]
    first = Span((5, 6, 7), range(10, 13))
    gaps = Span((8, 9), (20, 25), (Place(0, 10), Place(0, 15, 1, 3), Place(0, 10)))
    grouped = Span((4,), (12,), (Place(0, 0, group=2), Place(0, 0)), groups=(Group(0.9, 0.8), Group(1.0, 2.0)))
    plan = Plan((first, gaps, grouped, Span((1,), range(30, 31), cached=False)))
    keys = plan.keys("model", "tenant")
    a = span_key("model", "tenant", [5, 6, 7], [10, 11, 12], [])
    assert keys[0] == a
    places = [(a, 10, 0, 3, 0), (a, 15, 1, 3, 0), (a, 10, 0, 3, 0)]
    assert keys[1] == span_key("model", "tenant", [8, 9], [20, 25], places)
    places = [(a, 0, 0, 3, 2), (a, 0, 0, 3, 0)]
    assert keys[2] == span_key("model", "tenant", [4], [12], places, [(0.9, 0.8), (1.0, 2.0)])


def test_document_names_the_constants():
    text = DOC.read_text()
    for word in (codec.PREFIX.decode(), f"{codec.MAX_HEADER:,}", "kvgraph-store 1", "kvgraph-key-1", *codec.ITEMSIZE):
        assert word in text, word


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_numbers_that_are_not_finite_are_seen_anywhere(dtype):
    top = torch.finfo(dtype).max
    whole = torch.tensor([[0.0, -0.0, top, -top, 1e-30, -1.0]], dtype=dtype)
    assert codec._is_finite(whole) and codec._is_finite(whole.expand(3, 6)) and codec._is_finite(whole[:, :0])
    for number in ("nan", "-nan", "inf", "-inf"):
        for n in range(whole.numel()):
            spoilt = whole.clone()
            spoilt[0, n] = float(number)
            assert not codec._is_finite(spoilt), (number, n)
