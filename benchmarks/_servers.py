"""The servers the clients are measured against, all on loopback, all ended with their context.

nginx serves static files as a bucket (ETag, ranges), over HTTP and over TLS with a certificate of
a throw-away authority; the C sink takes uploads, and nginx stands before it for TLS.
"""

from __future__ import annotations

import ctypes
import json
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
BUCKET = "bucket"


class Unavailable(Exception):
    """Something the benchmark stands on is missing here."""


def need(*programs: str) -> None:
    """Raise `Unavailable` unless each program is on the PATH."""
    for name in programs:
        if shutil.which(name) is None:
            hint = {"nginx": "apt-get install nginx-light", "cc": "apt-get install gcc libc6-dev"}.get(name, "")
            raise Unavailable(f"{name} is not installed" + (f" ({hint})" if hint else ""))


def build(folder: Path, *names: str, tls: bool = False) -> list[Path]:
    """Compile ``NAME.c`` into `folder`, for each of `names`; returns the programs. With `tls` s3server can speak it.

    Raises:
        Unavailable: there is no compiler, or with `tls` no OpenSSL to build with.
    """
    need("cc")
    with_tls = ["-DTLS", "-lssl", "-lcrypto"]
    if tls:
        probe = folder / "openssl-probe"
        source = "#include <openssl/ssl.h>\nint main(void) { return !TLS_server_method(); }\n"
        argv = ["cc", "-x", "c", "-", "-o", str(probe), *with_tls]
        if subprocess.run(argv, check=False, input=source, text=True, capture_output=True).returncode:
            raise Unavailable("OpenSSL's headers are not installed (apt-get install libssl-dev)")
        probe.unlink()
    for name in names:
        argv = ["cc", "-O2", "-Wall", "-o", str(folder / name), str(HERE / f"{name}.c"), "-lpthread"]
        subprocess.run(argv + (with_tls if tls and name == "s3server" else []), check=True)
    return [folder / name for name in names]


def certificate(folder: Path, *names: str) -> Path:
    """Write ``cert.pem`` and ``key.pem`` of a server of these names into `folder`; returns the ``ca.pem`` to trust.

    Raises:
        Unavailable: what makes certificates is not installed.
    """
    try:
        import trustme
    except ImportError as error:
        raise Unavailable("trustme is not installed (pip install trustme)") from error
    folder.mkdir(parents=True, exist_ok=True)
    authority = trustme.CA()
    issued = authority.issue_cert(*names)
    authority.cert_pem.write_to_path(str(folder / "ca.pem"))
    issued.private_key_pem.write_to_path(str(folder / "key.pem"))
    (folder / "cert.pem").unlink(missing_ok=True)
    for blob in issued.cert_chain_pems:
        blob.write_to_path(str(folder / "cert.pem"), append=True)
    return folder / "ca.pem"


@dataclass(frozen=True)
class Layout:
    """One set of objects: `count` of `size` bytes under ``<name>/%06d``, or one object of all of them."""

    name: str
    count: int
    size: int
    single: bool = False
    distinct: int = 1 << 30
    """How many differ; the others are hard links to them, which keeps the page cache small."""

    def key(self, i: int) -> str:
        return f"{self.name}.bin" if self.single else f"{self.name}/{i:06d}"


def make_objects(folder: Path, layouts: Sequence[Layout]) -> None:
    """Write the objects of `layouts` as files below ``folder/BUCKET``."""
    rng = random.Random(20261125)
    noise = rng.randbytes(1 << 20) * 2
    for layout in layouts:
        if layout.single:
            path = folder / BUCKET / layout.key(0)
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "wb") as file:
                for i in range(layout.count):
                    file.write(body(noise, i, layout.size))
            continue
        (folder / BUCKET / layout.name).mkdir(parents=True, exist_ok=True)
        for i in range(layout.count):
            path = folder / BUCKET / layout.key(i)
            if i >= layout.distinct:
                os.link(folder / BUCKET / layout.key(i % layout.distinct), path)
            else:
                path.write_bytes(body(noise, i, layout.size))


def body(noise: bytes, i: int, size: int) -> bytes:
    """`size` bytes that differ from number to number: the number, then noise from another offset."""
    head = i.to_bytes(8, "little")
    at = i * 7919 % (1 << 20)
    text = head + noise[at : at + (1 << 20)]
    return (text * (size // len(text) + 1))[:size]


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def _free_ports(n: int) -> list[int]:
    sockets = [socket.socket() for _ in range(n)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _wait_for(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(200):
        if process.poll() is not None:
            break
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            time.sleep(0.05)
    raise Unavailable(f"the server did not start: {log.read_text()[-500:] if log.exists() else ''}")


@contextmanager
def started(binary: Path, *, reserve_mib: int = 0, addresses: int = 1, tls: Path | None = None) -> Iterator[int]:
    """Run one of our C servers (sink, s3server); yields its port. All arguments but the first are s3server's.

    `reserve_mib`: memory that it touches beforehand, so that no client pays for its page faults.
    `addresses`: it listens on so many, from 127.0.0.1 on.
    `tls`: a folder with what `certificate` made; the port then takes https beside http.
    """
    argv = [str(binary), "0", str(reserve_mib), str(addresses)]
    if tls is not None:
        argv += [str(tls / "cert.pem"), str(tls / "key.pem")]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE)
    assert process.stdout is not None
    try:
        yield int(process.stdout.readline())
    finally:
        _end(process)
        process.stdout.close()


def stats(port: int) -> dict[str, int]:
    """What one of our C servers has seen so far: ``requests`` and bytes."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/__stats", timeout=10) as answer:
        return dict(json.load(answer))


def forget(port: int, prefix: str) -> None:
    """Make s3server drop every key below ``BUCKET/PREFIX``."""
    request = urllib.request.Request(f"http://127.0.0.1:{port}/__prefix/{prefix}", method="DELETE")
    urllib.request.urlopen(request, timeout=60).close()


@dataclass(frozen=True)
class Nginx:
    """Where a running nginx listens."""

    http: int
    tls: int
    tls_sink: int
    ca: Path
    _status: int

    def requests(self) -> int:
        """Requests answered so far, without those that ask for this number."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self._status}/status", timeout=10) as answer:
            text = answer.read().decode()
        total = int(re.search(r"\n\s*\d+\s+\d+\s+(\d+)", text)[1])  # type: ignore[index]
        _status_calls[0] += 1
        return total - _status_calls[0]


_status_calls = [0]
_LIMIT = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
_DESCRIPTORS = 200_000 if _LIMIT == resource.RLIM_INFINITY else min(200_000, _LIMIT)  # above it nginx answers 500

CONFIG = """
daemon off;
worker_processes {workers};
pid {folder}/nginx.pid;
error_log {folder}/error.log warn;
worker_rlimit_nofile {descriptors};
events {{ worker_connections 4096; multi_accept on; }}
http {{
  access_log off;
  sendfile on; sendfile_max_chunk 4m; tcp_nopush off; tcp_nodelay on;
  keepalive_timeout 1h; keepalive_requests 1000000000;
  open_file_cache max={cached_files} inactive=1h; open_file_cache_valid 1h;
  client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/f; uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;
  client_max_body_size 0; default_type application/octet-stream;
  ssl_certificate {folder}/cert.pem; ssl_certificate_key {folder}/key.pem; ssl_protocols TLSv1.3;
  ssl_session_cache shared:tls:4m;
  server {{ listen 127.0.0.1:{http}; listen 127.0.0.1:{tls} ssl; root {data}; }}
  server {{ listen 127.0.0.1:{status}; location /status {{ stub_status; }} }}
  upstream sink {{ server 127.0.0.1:{sink}; keepalive 128; keepalive_requests 1000000000; }}
  server {{
    listen 127.0.0.1:{tls_sink} ssl;
    location / {{
      proxy_pass http://sink; proxy_http_version 1.1; proxy_set_header Connection ""; proxy_set_header Host $http_host;
      proxy_request_buffering off; proxy_pass_header ETag; proxy_pass_header Server;
    }}
  }}
}}
"""


@contextmanager
def nginx(folder: Path, data: Path, *, sink_port: int, workers: int = 2) -> Iterator[Nginx]:
    """Run nginx over `data` with everything it writes below `folder`."""
    need("nginx")
    ca = certificate(folder, "127.0.0.1", "localhost")
    http, tls, tls_sink, status = _free_ports(4)
    config = folder / "nginx.conf"
    config.write_text(
        CONFIG.format(
            descriptors=_DESCRIPTORS,
            cached_files=_DESCRIPTORS // 2,
            workers=workers,
            folder=folder,
            data=data,
            http=http,
            tls=tls,
            tls_sink=tls_sink,
            status=status,
            sink=sink_port,
        )
        + ("" if os.getuid() else "user root;\n")
    )
    _status_calls[0] = 0
    process = subprocess.Popen(
        ["nginx", "-p", str(folder), "-c", str(config)],
        preexec_fn=_die_with_parent,  # noqa: PLW1509 - this process has one thread
        stderr=subprocess.DEVNULL,
    )
    try:
        _wait_for(http, process, folder / "error.log")
        yield Nginx(http, tls, tls_sink, ca, status)
    finally:
        _end(process)


def nginx_version() -> str:
    """Of the nginx on the PATH."""
    done = subprocess.run(["nginx", "-v"], check=False, capture_output=True, text=True)
    return done.stderr.strip().rsplit("/", 1)[-1]
