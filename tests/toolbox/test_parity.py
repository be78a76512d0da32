"""docs/parity.md is whole and true: each row of the checklist, tests and names that exist, reasons for what is not here."""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import s3loader
from s3loader.cli.main import COMMANDS
from s3loader.compat import s3dlio

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "parity.md").read_text(encoding="utf-8")

CHECKLIST = """
put bytes, path, file object; entry dict | get whole, range | get into a caller's buffer | get_many, get_many_stats, and async |
put_many, and async | stat, head, exists, stat_many, and async | list: recursive, delimiter, pattern |
delete key, prefix, regex | create, delete, list buckets | upload, download, globs, cp, progress |
templates, scope, base_prefix, infer_id | settings from environment and .env | typed errors | object versions |
JSONL manifest, refs, cycle safety, limits | overwrite, append_parts |
ManifestWriter: thresholds, stats, publish_on_error, add_manifest | atomic, concurrent appends |
compact, list_files, prefix filter, delete report | manifest-driven dataset |
tar, tar.gz writing, internal manifest, split | virtual keys `archive#member` |
ranged random access into tar; indexed gz, zstd | checksums of members, verified on read |
NPZ read, generate | TFRecord generate | TFRecord index (DALI text) | HDF5 generate | Parquet row-group loader, index, Arrow |
dedup and compression factors, seeds |
torch iterable, map; tensor, bytes, reader | JAX and TensorFlow loaders |
async generic loader, items() with URI, collect_batch | shuffle, seed | rank x worker sharding | drop_last, batch_size |
concurrent prefetch in the framework's path | range reader for big objects |
epoch control, resume inside an epoch, state_dict | fork and spawn | error propagation | auto-tuning | local cache |
s3torchconnector drop-in | DLIO integration |
streaming multipart writer, reserve, commit | checkpoint store, latest, list, delete | distributed shards, finalize |
compression (zstd), checksum, validation | async save, retention, resharding, torch DCP, monotonic latest |
write verification, retry |
op-log TSV.zst (columns of warp) | replay | op-log stats, client id, clock offset | metrics, latency histograms, progress |
S3, custom endpoint, CA bundle | file://, direct:// | Azure, GCS | multi-endpoint balancing |
HTTP/2, redirects, unsigned payload | retries and timeouts configurable | CLI
"""


def rows(columns: int) -> list[list[str]]:
    """The rows of the tables with so many columns, without their heads."""
    found = [[cell.strip() for cell in line[1:-1].split(" | ")] for line in PAGE.splitlines() if line.startswith("| ")]
    return [row for row in found if len(row) == columns and row[0] not in ("feature", "s3dlio")]


FEATURES = rows(3)
NAMES = rows(2)


def test_every_row_of_the_checklist_stands_there_once() -> None:
    wanted = [" ".join(row.split()) for row in CHECKLIST.split(" |")]
    wanted = [row for part in wanted for row in part.split(" | ")]
    found = [row[0] for row in FEATURES]
    assert [name for name in found if name in wanted] == wanted
    assert len(found) == len(set(found))


@cache
def functions_of(path: str) -> set[str]:
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("row", FEATURES, ids=lambda row: row[0])
def test_every_row_has_tests_and_names_that_exist(row: list[str]) -> None:
    proofs = re.findall(r"`(tests/[^`]+)::(test_\w+)`", row[2])
    assert proofs
    for path, name in proofs:
        assert name in functions_of(path), f"{path}::{name}"
    for name in re.findall(r"`([^`]+)`", row[1]):
        assert exists(name), name


@pytest.mark.parametrize("row", NAMES, ids=lambda row: row[0])
def test_every_name_of_s3dlio_leads_somewhere(row: list[str]) -> None:
    for name in re.findall(r"`([^`]+)`", row[1]):
        assert exists(name), name


def test_every_name_that_is_kept_stands_there() -> None:
    named = [name for row in NAMES for name in re.findall(r"`([^`]+)`", row[0])]
    assert len(named) == len(set(named))
    assert set(s3dlio.__all__) == {name for name in named if name in s3dlio.__all__}
    absent = {name for row in NAMES if row[1].startswith("*not here*") for name in re.findall(r"`([^`]+)`", row[0])}
    assert set(named) - absent == set(s3dlio.__all__)
    assert not absent & set(s3dlio.__all__)


def test_what_is_not_here_has_a_reason() -> None:
    for row in [*FEATURES, *NAMES]:
        for reason in row[1].split("*not here*")[1:]:
            assert re.match(r"[:,] \S.{10,}", reason), row


OTHERS = {"logging", "memoryview", "tfrecord2idx", "direct://", "gs://", "az://", ".tar.gz", "async for", "--op-log", "s3-cli"}
OTHERS |= {
    "from_uris",
    "bytes",
    "bytearray",
    "reserve",
    "create_s3_writer",
    "load_checkpoint_with_validation",
    "tf_example",
    "tf.train.Example",
}
"""Words in the table that are no names of ours."""


def exists(name: str) -> bool:
    """Whether `name` is one of ours: a name of the package, a command, an option."""
    if name in OTHERS or name.endswith("=") or name in options():
        return True
    if name.startswith("s3loader ") and not name.startswith("s3loader."):
        return name.removeprefix("s3loader ") in COMMANDS
    return any(resolves(f"{start}{name}") for start in ("s3loader.", "s3loader.packing.", ""))


def options() -> set[str]:
    return {field for name in ("LoaderOptions", "StoreOptions") for field in getattr(s3loader, name).__annotations__} | {
        "endpoint_url",
        "ca_bundle",
    }


def resolves(dotted: str) -> bool:
    """Whether a dotted path from the package down leads to something."""
    if dotted in ("s3loader.jax", "s3loader.tensorflow"):
        return importlib.util.find_spec(dotted) is not None  # what they import is not needed to know it
    for module, rest in splits(dotted):
        try:
            found = importlib.import_module(module)
        except ImportError:
            continue
        for part in rest:
            if not hasattr(found, part):
                break
            found = getattr(found, part)
        else:
            return module.startswith("s3loader")
    return False


def splits(dotted: str) -> Iterator[tuple[str, list[str]]]:
    parts = dotted.split(".")
    for count in range(len(parts), 0, -1):
        yield ".".join(parts[:count]), parts[count:]
