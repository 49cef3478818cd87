"""An S3 server of moto's in a thread of the test, with a layer in front of it that misbehaves when told to."""

import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import boto3
import fsspec
import pytest
from moto.server import DomainDispatcherApplication, create_backend_app
from s3fs import S3FileSystem
from werkzeug.serving import make_server

from ldmlab.data import transfers

KEY = "the-right-key"
_DENIED = b'<?xml version="1.0"?><Error><Code>%s</Code><Message>%s</Message></Error>'
Respond = Callable[[str, list[tuple[str, str]]], Any]


@dataclass
class Faults:
    """A WSGI application in front of another one; each planted fault hits the next requests for a name."""

    app: Any
    planted: list[tuple[str, str, int]] = field(default_factory=list)  # "KIND [METHOD]", end of the name, how often
    gets: Counter[str] = field(default_factory=Counter)  # answered requests for contents, by name
    puts: Counter[str] = field(default_factory=Counter)

    def plant(self, kind: str, name: str, times: int) -> None:
        self.planted.append((kind, name, times))

    def _next(self, method: str, path: str) -> str | None:
        for place, (kind, name, times) in enumerate(self.planted):
            if path.endswith(name) and times and method == (kind.split()[1:] or ["GET"])[0]:
                self.planted[place] = kind, name, times - 1
                return kind.split()[0]
        return None

    def __call__(self, environ: dict[str, Any], respond: Respond) -> Iterable[bytes]:
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        signed = environ.get("HTTP_AUTHORIZATION", "")
        if signed and KEY not in signed:
            answer = self._error(respond, "403 Forbidden", b"InvalidAccessKeyId", b"no such key")
            return [] if method == "HEAD" else answer
        kind = self._next(method, path)
        if method in ("GET", "PUT"):
            (self.gets if method == "GET" else self.puts)[path.rpartition("/")[2]] += 1
        if kind == "500":
            return self._error(respond, "500 Internal Server Error", b"InternalError", b"planted")
        if kind == "403":
            return self._error(respond, "403 Forbidden", b"AccessDenied", b"planted")
        if kind == "reset":
            environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
        if kind == "slow":
            time.sleep(1.5)
        answer = self.app(environ, respond)
        if kind in ("cut", "altered"):
            content = b"".join(answer)
            return [content[: len(content) // 2] if kind == "cut" else content[:-1] + b"x"]
        return answer  # type: ignore[no-any-return]

    @staticmethod
    def _error(respond: Respond, status: str, code: bytes, words: bytes) -> list[bytes]:
        body = _DENIED % (code, words)
        respond(status, [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
        return [body]


@dataclass
class S3:
    """The running server, whose one bucket is `lab`."""

    faults: Faults
    port: int
    client: Any

    def upload(self, folder: Path, prefix: str) -> str:
        """All files of a folder; the address."""
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                key, content = f"{prefix}/{path.relative_to(folder)}", path.read_bytes()
                self.client.put_object(Bucket="lab", Key=key, Body=content, ACL="public-read")
        return f"s3://lab/{prefix}"

    def names(self, prefix: str) -> set[str]:
        listed = self.client.list_objects_v2(Bucket="lab", Prefix=f"{prefix}/")
        return {entry["Key"].removeprefix(f"{prefix}/") for entry in listed.get("Contents", [])}


@contextmanager
def running_s3() -> Iterator[S3]:
    """A server for a module's tests; the environment points to it."""
    faults = Faults(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, faults, threaded=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("AWS_ACCESS_KEY_ID", KEY)
            patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
            patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
            patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.port}")
            patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
            patch.setitem(
                fsspec.config.conf, "s3", {"config_kwargs": {"read_timeout": 1, "retries": {"max_attempts": 0}}}
            )
            patch.setattr(S3FileSystem, "retries", 1)  # so that the tries are ours
            patch.setattr(transfers, "FIRST_WAIT_SECONDS", 0.01)
            for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "LDMLAB_SHARDS"):
                patch.delenv(name, raising=False)
            urlopen(f"http://127.0.0.1:{server.port}/moto-api/reset", data=b"").close()  # buckets outlive a server
            S3FileSystem.clear_instance_cache()  # of another server
            client = boto3.client("s3")
            client.create_bucket(Bucket="lab")
            yield S3(faults, server.port, client)
    finally:
        server.shutdown()
