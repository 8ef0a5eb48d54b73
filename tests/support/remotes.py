"""Real servers for remote tiers, on free ports of this machine, and a place in memory that can be made to fail."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.request import urlopen

from kvgraph.store.remote.base import Listed, RemoteError, RemoteFull, Space


class RedisServer:
    """A redis-server of one's own. Nothing is saved to disk."""

    def __init__(self, folder: Path, *options: str):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.folder, self.options = folder, options
        self.start()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> None:
        words = ["redis-server", "--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
        with open(self.folder / "redis.log", "ab") as log:
            self.process = subprocess.Popen([*words, "--dir", str(self.folder), *self.options], stdout=log, stderr=log)
        deadline = time.monotonic() + 20
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), 0.2).close()
                return
            except OSError:
                assert self.process.poll() is None and time.monotonic() < deadline, "redis-server doesn't start"
                time.sleep(0.02)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    @contextmanager
    def paused(self) -> Iterator[None]:
        self.process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.resume()

    def resume(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def client(self):
        import redis

        return redis.Redis(port=self.port)


def postgres_programs() -> Path | None:
    """Where initdb and postgres are."""
    found = shutil.which("initdb")
    debian = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    return Path(found).resolve().parent if found else debian[-1].parent if debian else None


class PostgresServer:
    """A Postgres of one's own, which lets in everybody of this machine. It refuses to run as root, so another user does."""

    def __init__(self, folder: Path):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        programs = postgres_programs()
        assert programs is not None
        self._postgres, self._data = programs / "postgres", folder / "data"
        self._as = {"user": "postgres", "group": "postgres"} if os.getuid() == 0 else {}
        if self._as:
            shutil.chown(folder, **self._as)
            for parent in folder.parents:  # a folder of tests is closed to others
                if parent.owner() == "root" and parent != Path("/"):
                    parent.chmod(parent.stat().st_mode | 0o011)
        words = [programs / "initdb", "-D", self._data, "-U", "kvgraph", "-A", "trust", "-E", "UTF8", "--no-sync"]
        subprocess.run(words, check=True, stdout=subprocess.DEVNULL, cwd="/", **self._as)
        self.start()

    @property
    def url(self) -> str:
        return f"postgresql+psycopg://kvgraph:a-password@127.0.0.1:{self.port}/postgres"

    def start(self) -> None:
        words = [self._postgres, "-D", self._data, "-p", str(self.port), "-c", f"unix_socket_directories={self._data}"]
        self.process = subprocess.Popen(
            [*words, "-c", "fsync=off", "-h", "127.0.0.1"], stderr=subprocess.DEVNULL, cwd="/", **self._as
        )
        deadline = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), 0.2).close()
                return
            except OSError:
                assert self.process.poll() is None and time.monotonic() < deadline, "postgres doesn't start"
                time.sleep(0.05)

    def stop(self) -> None:
        self.process.send_signal(signal.SIGINT)  # ends connections
        self.process.wait()


class S3Server:
    """moto's server with one bucket, in a process of its own. `environment` is what clients need."""

    def __init__(self):
        import sys

        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.address = f"http://127.0.0.1:{port}"
        self.process = subprocess.Popen(
            [
                sys.executable,
                "-c",
                f"import sys; from moto.server import main; main(['-H', '127.0.0.1', '-p', '{port}'])",
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self.environment = {
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "a-secret-that-nobody-may-see",
            "AWS_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": self.address,
        }
        deadline = time.monotonic() + 60
        while True:
            try:
                urlopen(f"{self.address}/moto-api/", timeout=1).close()
                break
            except OSError:
                assert self.process.poll() is None and time.monotonic() < deadline, "moto's server doesn't start"
                time.sleep(0.1)
        self.client().create_bucket(Bucket="bucket")

    def client(self):
        import boto3

        keys = {"aws_access_key_id": "testing", "aws_secret_access_key": "a-secret-that-nobody-may-see"}
        return boto3.client("s3", endpoint_url=self.address, region_name="us-east-1", **keys)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


class Proxy:
    """Stands between clients and an S3 server, and does harm to what it passes on.

    mode: "fine"; "slow" (answers after `delay` seconds); "silent" (never answers); "errors" (500); "refuses" (503);
    "truncates" (half a body under a whole one's length); "shortens" (half a body as if it were all); "garbage"; "mixes up"
    (the body of the object asked for before).
    """

    def __init__(self, target: str, delay: float = 0.3):
        import http.client
        from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

        self.mode, self.delay, self.spoilt, self.last = "fine", delay, 0, b""
        self._end = threading.Event()
        proxy, host = self, target.removeprefix("http://")

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def pass_on(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                mode, is_read = proxy.mode, self.command == "GET" and "list-type" not in self.path
                proxy.spoilt += mode != "fine"
                if mode == "slow":
                    time.sleep(proxy.delay)
                elif mode == "silent":
                    proxy._end.wait(60)
                    self.close_connection = True
                    return
                elif mode in ("errors", "refuses"):
                    self.send_response(500 if mode == "errors" else 503)
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                connection = http.client.HTTPConnection(host, timeout=30)
                connection.request(self.command, self.path, body, dict(self.headers))
                answer = connection.getresponse()
                data = answer.read()
                connection.close()
                length = len(data)
                if is_read and answer.status < 300:
                    before, proxy.last = proxy.last, data
                    if mode == "truncates":
                        data = data[: length // 2]
                        self.close_connection = True
                    elif mode == "shortens":
                        data = data[: length // 2]
                        length = len(data)
                    elif mode == "garbage":
                        data = os.urandom(length)
                    elif mode == "mixes up" and before:
                        data, length = before, len(before)
                self.send_response(answer.status)
                for name, value in answer.getheaders():
                    if name.lower() not in ("content-length", "transfer-encoding", "connection", "date", "server"):
                        if name.lower() == "content-range" and length != int(
                            answer.getheader("Content-Length", length)
                        ):
                            value = f"bytes 0-{length - 1}/{length}"
                        self.send_header(name, value)
                head = self.command == "HEAD"
                self.send_header("Content-Length", answer.getheader("Content-Length", "0") if head else str(length))
                self.end_headers()
                if not head:
                    self.wfile.write(data)

            do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = pass_on

            def log_message(self, *_: object) -> None:
                pass

            def handle(self) -> None:
                try:
                    super().handle()
                except OSError:  # the client gave up
                    pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        self._end.set()
        self.server.shutdown()
        self.server.server_close()


def has_redis() -> bool:
    return shutil.which("redis-server") is not None


class MemoryPlace:
    """A `Remote` in this process. `fault` is what happens to the next calls: None, "dead", "full", "slow", or a function
    of the bytes that are read."""

    def __init__(self, spaces: dict[Space, MemoryPlace] | None = None) -> None:
        self.kept: dict[str, bytes] = {}
        self.others = {} if spaces is None else spaces  # of the same place, by namespace
        self.fault = None
        self.calls = 0

    def _call(self) -> None:
        self.calls += 1
        if self.fault == "dead":
            raise RemoteError("dead")
        if self.fault == "slow":
            time.sleep(0.3)

    def get(self, name):
        self._call()
        data = self.kept.get(name)
        return self.fault(data) if callable(self.fault) and data is not None else data

    def put(self, name, parts):
        self._call()
        if self.fault == "full":
            raise RemoteFull("full")
        self.kept[name] = b"".join(parts)

    def contains(self, name):
        self._call()
        return name in self.kept

    def delete(self, name):
        self._call()
        return self.kept.pop(name, None) is not None

    def names(self):
        self._call()
        yield from [Listed(name, len(data)) for name, data in self.kept.items()]

    def start(self, listed, size):
        self._call()
        return self.kept[listed.name][:size] if listed.name in self.kept else None

    def leftovers(self, remove):
        return 0

    def spaces(self):
        self._call()
        yield from self.others

    def within(self, space):
        return self.others.setdefault(space, MemoryPlace(self.others))

    def close(self) -> None:
        pass


def environment(**values: str) -> dict[str, str]:
    return {**os.environ, **values}
