"""Object stores through obstore: S3 and what speaks like it, Google Cloud Storage, Azure.

One object a record: `<prefix>/<fingerprint>/<tenant>/<key>`. Large ones are read in ranges, several at once.

Credentials, region and endpoint come from the environment, by the names the clouds' own tools use: AWS_ACCESS_KEY_ID,
AWS_SECRET_ACCESS_KEY, AWS_REGION, AWS_ENDPOINT_URL, GOOGLE_APPLICATION_CREDENTIALS, AZURE_STORAGE_ACCOUNT_KEY, ...
Buckets are addressed by path unless AWS_VIRTUAL_HOSTED_STYLE_REQUEST says otherwise.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import ParamSpec, TypeVar

from kvgraph.errors import StoreError
from kvgraph.store.remote.base import LARGEST, Address, Listed, RemoteError, Space, Whole
from kvgraph.store.remote.store import RemoteStore

P = ParamSpec("P")
T = TypeVar("T")

RANGE = 8 << 20  # bytes of one request
AT_ONCE = 4  # requests for ranges of an object at a time
ENDPOINTS = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT", "GOOGLE_BASE_URL", "AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT")
NAMES = {"s3": "s3", "s3a": "s3", "gs": "gcs", "az": "azure", "azure": "azure", "abfs": "azure"}


def open_objects(url: str, fingerprint: str, tenant: str) -> RemoteStore:
    """The store at `s3://bucket/prefix[?timeout=seconds]`, also `gs://`, `az://`, ..."""
    address = Address.of(url)
    remote = Objects(address, Space.of(fingerprint, tenant))
    return RemoteStore(remote, NAMES[address.scheme], address.shown, fingerprint, address.timeout, tenant)


class Objects:
    """A `kvgraph.store.remote.base.Remote`. Below the URL's prefix, a namespace is a folder in a folder."""

    def __init__(self, address: Address, space: Space):
        try:
            import obstore
            from obstore.store import from_url
        except ImportError:
            raise StoreError(f"{address.scheme}:// needs the package obstore: pip install 'kvgraph[store]'") from None
        self._obstore, self._folder = obstore, "/".join(space)
        seconds = f"{max(1, round(address.timeout))}s"
        plain = any(os.environ.get(name, "").startswith("http://") for name in ENDPOINTS)
        try:
            self._store = from_url(
                address.url,
                client_options={"timeout": seconds, "connect_timeout": seconds, "allow_http": plain},
                retry_config={"max_retries": 1, "retry_timeout": timedelta(seconds=address.timeout)},
            )
        except (obstore.exceptions.BaseError, ValueError) as error:
            raise StoreError(f"{address.shown} can't be opened as an object store: {_why(error)}") from None

    def get(self, name: str) -> memoryview | bytes | None:
        """The first range says how large the object is; the others are fetched several at a time."""
        return self._asked(self._get, name)

    def _get(self, name: str) -> memoryview | bytes | None:
        path = self._path(name)
        try:
            first = self._obstore.get(self._store, path, options={"range": (0, RANGE)})
            size = first.meta["size"]
            if size > LARGEST:
                return b""  # which is no record
            whole = Whole(size)
            whole.add(first.bytes())
            starts = range(whole.filled, size, RANGE)
            for at in range(0, len(starts), AT_ONCE):
                begins = list(starts[at : at + AT_ONCE])
                ends = [min(start + RANGE, size) for start in begins]
                for part in self._obstore.get_ranges(self._store, path, starts=begins, ends=ends):
                    whole.add(part)
        except (FileNotFoundError, MemoryError):  # there is none, or no room for it
            return None
        return whole.data()

    def put(self, name: str, parts: Sequence[bytes | memoryview]) -> None:
        """In one request or, if it is large, in an upload of several parts that shows when it is complete."""
        self._asked(self._obstore.put, self._store, self._path(name), b"".join(parts))

    def contains(self, name: str) -> bool:
        """Asks for the object's head."""
        try:
            self._asked(self._obstore.head, self._store, self._path(name))
        except FileNotFoundError:
            return False
        return True

    def delete(self, name: str) -> bool:
        """Object stores don't tell whether there was something: this asks first."""
        found = self.contains(name)
        if found:
            self._asked(self._obstore.delete, self._store, self._path(name))
        return found

    def names(self) -> Iterator[Listed]:
        """By listing the folder."""
        try:
            for page in self._obstore.list(self._store, f"{self._folder}/"):
                for found in page:
                    name = found["path"].rpartition("/")[2]
                    yield Listed(name, found["size"], found["last_modified"].timestamp())
        except (self._obstore.exceptions.BaseError, OSError) as error:
            raise RemoteError(_why(error)) from error

    def start(self, listed: Listed, size: int) -> bytes | None:
        """A ranged read."""
        path, length = self._path(listed.name), min(size, listed.size)
        try:
            return bytes(self._asked(self._obstore.get_range, self._store, path, start=0, length=length))
        except FileNotFoundError:
            return None

    def leftovers(self, remove: bool) -> int:
        """None: an object appears whole."""
        return 0

    def spaces(self) -> Iterator[Space]:
        """Folders of folders, as far as they have our names."""
        for folder in self._folders(None):
            for inner in self._folders(folder):
                space = Space.read(folder, inner)
                if space is not None:
                    yield space

    def within(self, space: Space) -> Objects:
        """The same client, in another folder."""
        other = copy.copy(self)
        other._folder = "/".join(space)
        return other

    def _folders(self, within: str | None) -> list[str]:
        prefix = None if within is None else f"{within}/"
        found = self._asked(self._obstore.list_with_delimiter, self._store, prefix)
        return [path.rstrip("/").rpartition("/")[2] for path in found["common_prefixes"]]

    def close(self) -> None:
        """Nothing: obstore closes idle connections itself."""

    def _asked(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return call(*args, **kwargs)
        except FileNotFoundError:
            raise
        except (self._obstore.exceptions.BaseError, OSError) as error:
            raise RemoteError(_why(error)) from error

    def _path(self, name: str) -> str:
        return f"{self._folder}/{name}"


def _why(error: Exception) -> str:
    """One line, without the details that follow it."""
    return f"{type(error).__name__}: {(str(error).splitlines() or ['no reason given'])[0][:300]}"
