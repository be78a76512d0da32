"""``doctor config completion``: what the store supports, and what to do about what it does not; every setting with where it
came from; what a shell needs to complete commands and options."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import os
import platform
import time
import uuid
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import click

from s3loader.cli.objects import place
from s3loader.cli.output import json_option, print_json
from s3loader.errors import BucketNotFoundError, S3LoaderError
from s3loader.types import ObjectURL
from s3loader.units import MIB, format_duration, format_rate

if TYPE_CHECKING:
    from s3loader.store import ObjectStore

__all__ = ["completion", "config", "doctor"]

_SAMPLE = 16 * MIB
_SKEW_LIMIT_S = 60.0

_ADVICE = {
    "create": "create-only puts overwrite silently here: checkpoints and manifests run in single-writer mode",
    "update": "If-Match on a put does not work here: only one writer at a time may append to a manifest",
    "multipart_create": "the condition on completing a multipart upload is ignored: do not put large files conditionally",
    "get_if_match": "the server ignores If-Match on reads: the ETag of every answer is checked by the client instead",
    "upload_checksum": "a wrong checksum on an upload is accepted: corruption on the way is found when reading",
}


@dataclass
class Examination:
    """What the doctor found."""

    url: str
    engine: str = ""
    capabilities: dict[str, bool] = field(default_factory=dict)
    clock_skew_s: float | None = None
    write_mb_s: float | None = None
    read_mb_s: float | None = None
    small_get_ms: float | None = None
    settings: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    advice: list[str] = field(default_factory=list)


@click.command()
@click.argument("url")
@json_option
def doctor(url: str, as_json: bool) -> None:
    """Examine the store at URL: conditions, checksums, clock, credentials, bandwidth; give advice.

    Writes a few objects under a name of its own below URL, and removes them.
    """
    from s3loader.store import open_store

    where = ObjectURL.parse(url)
    if where.scheme == "file" and not os.path.isdir(where.key):  # a store would make it, and hide the typing mistake
        raise BucketNotFoundError("there is no such folder", op="examine", url=str(where), hint="make it, or check the path")
    with open_store(url, **place()) as store:
        found = examine(store)
    if as_json:
        print_json(dataclasses.asdict(found))
        return
    for name, value in _rows(found):
        click.echo(f"  {name:<26}{value}")
    for line in found.advice:
        click.echo(f"advice: {line}")


def examine(store: ObjectStore) -> Examination:
    """Probe `store`; raises what the first request raises where nothing works at all."""
    found = Examination(store.url, store.engine, versions=_versions())
    if store.url.startswith("s3://"):
        found.settings = _settings()
    key = f"s3loader-doctor-{uuid.uuid4().hex}"
    try:
        _measure(store, key, found)
    except BaseException:
        with contextlib.suppress(S3LoaderError):  # what went wrong first is what the person must read
            store.delete(key)
        raise
    store.delete(key)
    found.capabilities = dataclasses.asdict(store.capabilities())
    found.advice = [text for name, text in _ADVICE.items() if not found.capabilities[name]]
    if found.clock_skew_s is not None and abs(found.clock_skew_s) > _SKEW_LIMIT_S:
        found.advice.append("this machine's clock is off: S3 refuses requests that are 15 minutes off; synchronise it")
    return found


def _measure(store: ObjectStore, key: str, found: Examination) -> None:
    before_wall, start = time.time(), time.perf_counter()
    data = bytes(1024) * (_SAMPLE // 1024)
    store.put(key, data)
    found.write_mb_s = _SAMPLE / 1e6 / (time.perf_counter() - start)
    modified = store.head(key).last_modified
    if modified is not None:
        # the store keeps whole seconds: within the put's own time there is no skew to speak of
        late = min(0.0, modified + 1 - before_wall)
        found.clock_skew_s = late or max(0.0, modified - time.time())
    start = time.perf_counter()
    store.get(key)
    found.read_mb_s = _SAMPLE / 1e6 / (time.perf_counter() - start)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        store.get_range(key, 0, 1)
        times.append(time.perf_counter() - start)
    found.small_get_ms = min(times) * 1000


def _settings() -> dict[str, str]:
    from s3loader.config import S3Settings

    lines = (line.split(" = ", 1) for line in S3Settings().describe().splitlines())
    return {name.strip(): value for name, value in lines}


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in ("s3loader", "boto3", "obstore", "awscrt", "torch", "tensorflow", "jax"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def _rows(found: Examination) -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = [("url", found.url), ("engine", found.engine)]
    rows += [(name, value) for name, value in found.settings.items()]
    rows += [(name.replace("_", " "), "yes" if value else "NO") for name, value in found.capabilities.items()]
    if found.clock_skew_s is not None:
        rows.append(("clock skew", "under a second" if abs(found.clock_skew_s) < 1 else f"{found.clock_skew_s:+.0f} s"))
    if found.write_mb_s is not None and found.read_mb_s is not None and found.small_get_ms is not None:
        rows.append(("one stream", f"write {format_rate(found.write_mb_s * 1e6)}, read {format_rate(found.read_mb_s * 1e6)}"))
        rows.append(("one small read", format_duration(found.small_get_ms / 1000)))
    rows.append(("versions", ", ".join(f"{name} {version}" for name, version in found.versions.items())))
    return rows


# -- s3loader config -------------------------------------------------------------------------------


@click.group()
def config() -> None:
    """Settings."""


@config.command()
@json_option
def show(as_json: bool) -> None:
    """Show every setting and its origin; secrets are masked."""
    from s3loader.config import S3Settings

    settings = S3Settings()
    if not as_json:
        click.echo(settings.describe())
        return
    lines = (line.split(" = ", 1) for line in settings.describe().splitlines())
    shown = {name.strip(): value.rsplit("  (", 1)[0] for name, value in lines}
    print_json({name: {"value": value, "origin": settings.origins.get(name)} for name, value in shown.items()})


# -- s3loader completion ---------------------------------------------------------------------------


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the script that completes s3loader in SHELL.

    bash: eval "$(s3loader completion bash)" in ~/.bashrc, zsh: the same with zsh in ~/.zshrc,
    fish: s3loader completion fish > ~/.config/fish/completions/s3loader.fish
    """
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    assert kind is not None
    made = kind(click.get_current_context().find_root().command, {}, "s3loader", "_S3LOADER_COMPLETE")
    click.echo(made.source_template % made.source_vars())
