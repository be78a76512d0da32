"""Samples into shards, with manifest, indexes and classes: whole or not there, and taken up again where it was broken off.

The samples are cut into parts. Each part is written as a manifest of its own below ``_pack/`` by one create-only put, with its
shards in a folder of its own: a part that has its manifest is done, whatever became of the process. When all are, the dataset's
manifest is put at once, and the parts' manifests go.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, Literal, TypeAlias, Unpack, cast

from s3loader.arguments import checked
from s3loader.checksum import json_seal_holds, seal_json
from s3loader.errors import ConfigError, FormatError, IntegrityError, ObjectExistsError, ObjectNotFoundError, ShardReadError
from s3loader.exchange.types import ManifestEntry, ShardSizePolicy
from s3loader.exchange.writer import ManifestWriter
from s3loader.loader.check import check_dataset
from s3loader.loader.dataset import Dataset
from s3loader.loader.loader import Loader
from s3loader.loader.mds import CompressedMdsShard
from s3loader.loader.opening import open_dataset
from s3loader.loader.sources import compressed_mds, rows_of_compressed_mds
from s3loader.loader.urls import expand_braces, one_store
from s3loader.packing.part import archive_of, drop_tries, entries_of, write_part
from s3loader.packing.sources import (
    Sample,
    Source,
    as_sample,
    column_member,
    of_folder,
    of_iterable,
    of_parquet,
    of_rows,
    of_tfrecord,
)
from s3loader.progress import Report, ShowProgress, check_progress, showing
from s3loader.store import ObjectStore, open_store
from s3loader.store.open import JobKeywords, StoreKeywords
from s3loader.tasks import TaskExecutor, executor_of
from s3loader.types import ObjectURL
from s3loader.units import parse_size

__all__ = ["Exists", "PackPlan", "PackReport", "Verify", "optimize", "pack", "plan_pack"]

Exists: TypeAlias = Literal["resume", "error", "replace"]
Verify: TypeAlias = Literal["full", "index", "none"]

MANIFEST: Final = "manifest.jsonl"
_CLASSES: Final = "classes.json"
_RECORD: Final = "pack.json"
_PARTS: Final = "_pack/"
_SHARDS_OF_A_PART: Final = 8
_SHARDS: Final = (".tar", ".tar.gz", ".tar.zst", ".tgz")
_BESIDE_SHARDS: Final = (".idx", ".json", ".jsonl", ".yaml", ".md", ".txt")
_RECORDS: Final = re.compile(r"(\.tfrecords?|\.tfrec|-of-[\d*?]+)(\.(gz|gzip|zz|zlib))?$")
"""Names of TFRecord files, and patterns of them."""
_INPUTS_OF_A_PART: Final = 256
_OVERHEAD: Final = 2048
"""Bytes of headers, padding and manifest lines of a sample, about."""
_VERSION: Final = 1


@dataclass(frozen=True, slots=True)
class PackPlan:
    """What would be packed."""

    url: str
    samples: int | None
    """None: nobody knows before they are made."""
    bytes: int | None
    """Of the files; None likewise."""
    shards: int | None
    """About."""
    classes: Mapping[str, int]
    """Samples of each class, by name or number."""
    left_out: Mapping[str, Sequence[str]]
    """Files that are not packed, by reason."""
    done: int
    """Parts that are there already."""
    parts: int


@dataclass(frozen=True, slots=True)
class PackReport:
    """What was packed."""

    url: str
    manifest: str
    """URL of the dataset's manifest."""
    samples: int
    bytes: int
    """Of the shards."""
    shards: int
    classes: Mapping[str, int]
    """The number of each class, as it stands in the members ``cls``."""
    left_out: Mapping[str, Sequence[str]]
    resumed: int
    """Parts that were there already."""
    unchanged: bool
    """All of it was there already, and nothing was written."""
    verified: Verify
    members: tuple[str, ...] = field(default=())
    """Extensions of the first sample."""

    def example(self) -> str:
        """Lines of Python that train on it."""
        image = next((e for e in self.members if e in ("jpg", "jpeg", "png", "webp")), "")
        names = [image] if image else list(self.members[:1])
        names += ["cls"] if "cls" in self.members and "cls" not in names else []
        fields = ", ".join(f'sample["{name}"]' for name in names)
        return (
            "from s3loader.torch import S3DataLoader, S3IterableDataset\n"
            f'dataset = S3IterableDataset.from_manifest("{self.manifest}", group="webdataset", batch_size=64, '
            'shuffle="block", decode="auto")\n'
            f"for batch in S3DataLoader(dataset, num_workers=2): ...  # a list of samples: {fields}"
        )


@checked
def pack(
    source: Any,
    url: str,
    *,
    labels: Any = "auto",
    shard_size: int | str = "64MiB",
    shard_samples: int | None = None,
    compression: str | None = None,
    shuffle: bool = True,
    seed: int = 0,
    workers: int = 0,
    exists: Exists = "resume",
    verify: Verify = "index",
    progress: ShowProgress = None,
    **store: Unpack[JobKeywords],
) -> PackReport:
    """Put samples into shards at `url`, ready to train on: ``manifest.jsonl``, shards with their indexes, ``classes.json``.

    Called again with the same source after an interruption, it goes on with the parts that are missing; when nothing is
    missing, it writes nothing. The manifest appears last, at once.

    Args:
        source: A local folder of files, in folders by class or flat: files of one stem in one folder are one sample; tar
            shards of WebDataset, an MDS folder or another dataset that `open_dataset` reads (its URL or path); Parquet files
            (a path, or a folder of them); TFRecord files, compressed or not, known by their names (``*.tfrecord.gz``,
            ``train-*-of-*``); a Hugging Face `datasets.Dataset`; an iterable of samples, or a function that
            returns one: ``{"jpg": bytes, "cls": 3}``, with ``"__key__"`` or not, or ``(key, {...})``.
        url: Where to: ``s3://bucket/prefix``, a folder ...
        labels: Of a folder: ``"auto"`` (the names of the first folders where all files lie in such), ``"folders"`` (must be
            so), None, a CSV or JSONL file (columns ``file``, ``label``; what else it has goes into the member ``json``), or a
            mapping from file to label.
        shard_size: Bytes of a shard.
        shard_samples: Samples of a shard at most.
        compression: Of the shards: None or ``"zstd"``.
        shuffle: Pack folders and Hugging Face datasets in an order drawn from `seed`: neighbours in a shard are then of mixed
            classes, which a block-wise shuffle needs. False: in the order of names or rows.
        seed: Of that order.
        workers: Processes that write parts; 0: this one. On a cluster: tasks at a time; 0: as many as it has CPUs.
        exists: What to do where there is a dataset: ``"resume"`` (go on, if it is from the same source, else raise),
            ``"error"``, ``"replace"`` (the old one's shards are deleted when the new manifest is there).
        verify: Afterwards: ``"index"`` compares shards, sizes, indexes and counts; ``"full"`` reads every member back and
            checks its CRC32C too; ``"none"``.
        progress: True shows it on stderr: a bar on a terminal, else a line a minute. A function is called with samples done,
            of how many (None: not known), and bytes of them.
        store: Keywords for `open_store`, of `url`; and ``engine="ray"`` with `address`: parts are written by tasks of a Ray
            cluster, which must see the files under the same paths. Parts that are there are not written again, whoever wrote
            them.

    Raises:
        ConfigError: there is nothing to pack, or an argument is unusable.
        SourceNotFoundError: no such folder or file.
        ObjectExistsError: there is a dataset from another source.
        IntegrityError: what was written is not what was packed.
    """
    policy = _policy(shard_size, shard_samples)
    options = {"shard_size": policy, "shard_compression": compression, "group": "webdataset"}
    found = _source(source, labels, shuffle, seed, _bytes_of(shard_size))
    executor, place = executor_of(store, workers)
    with open_store(url, **place) as target:
        return _Run(target, found, options, executor, exists, verify, progress, (url, dict(place))).run()


@checked
def optimize(
    fn: Callable[[Any], Any],
    inputs: Sequence[Any],
    url: str,
    *,
    shard_size: int | str = "64MiB",
    shard_samples: int | None = None,
    compression: str | None = None,
    workers: int = 0,
    exists: Exists = "resume",
    verify: Verify = "index",
    progress: ShowProgress = None,
    **store: Unpack[JobKeywords],
) -> PackReport:
    """As `pack`, of the samples that a function makes of each input; in their order, whatever the number of workers.

    Args:
        fn: Takes an input; returns a sample as `pack` takes it, None (nothing), or yields several. With workers it must be
            one that can be pickled: defined at the top of a module.
        inputs: A list; its `repr` tells whether an interrupted call is the same.
        url, shard_size, shard_samples, compression, workers, exists, verify, progress, store: As of `pack`, with
            ``engine="ray"``.
    """
    if not callable(fn):
        raise ConfigError(f"fn cannot be {type(fn).__name__}", hint="a function that makes a sample of one input")
    listed = list(inputs)
    parts = [partial(_made, fn, listed[at : at + _INPUTS_OF_A_PART], at) for at in range(0, len(listed), _INPUTS_OF_A_PART)]
    if not parts:
        raise ConfigError("there is nothing to pack: no inputs", hint="is the list empty?")
    name = f"{getattr(fn, '__module__', '')}.{getattr(fn, '__qualname__', '')}"
    digest = hashlib.sha256(repr([name, listed]).encode("utf-8", "surrogatepass")).hexdigest()
    found = Source(parts, None, None, digest if all(_told(value) for value in listed) else None)
    options = {"shard_size": _policy(shard_size, shard_samples), "shard_compression": compression, "group": "webdataset"}
    executor, place = executor_of(store, workers)
    with open_store(url, **place) as target:
        return _Run(target, found, options, executor, exists, verify, progress, (url, dict(place))).run()


@checked
def plan_pack(
    source: Any,
    url: str,
    *,
    labels: Any = "auto",
    shard_size: int | str = "64MiB",
    shuffle: bool = True,
    seed: int = 0,
    **store: Unpack[StoreKeywords],
) -> PackPlan:
    """What `pack` would do; writes nothing. Arguments as of `pack`."""
    size = _bytes_of(shard_size)
    found = _source(source, labels, shuffle, seed, size)
    where = ObjectURL.parse(url)
    done = 0
    if where.scheme != "file" or os.path.isdir(where.key):  # opening a store would make the folder
        with open_store(url, **store) as target:
            done = sum(1 for _ in target.list(_PARTS))
            done = len(found.parts) if target.exists(MANIFEST) else done
    shards = (
        None if found.bytes is None else max(len(found.parts), -(-(found.bytes + _OVERHEAD * (found.samples or 0)) // size))
    )
    return PackPlan(url, found.samples, found.bytes, shards, found.per_class, found.left_out, done, len(found.parts))


def _told(value: Any) -> bool:
    """Whether the value's `repr` says what it is."""
    if isinstance(value, (list, tuple)):
        return all(map(_told, value))
    if isinstance(value, Mapping):
        return all(map(_told, value.values()))
    return isinstance(value, (str, bytes, int, float, bool, os.PathLike, type(None)))


def _made(fn: Callable[[Any], Any], inputs: Sequence[Any], first: int) -> Iterator[Sample]:
    for number, value in enumerate(inputs, first):
        result = fn(value)
        if result is None:
            continue
        if isinstance(result, (Mapping, tuple, bytes, bytearray, memoryview)):
            yield as_sample(result, number)
            continue
        for which, sample in enumerate(result):
            yield as_sample(sample, f"{number:09d}-{which:04d}")


def _bytes_of(shard_size: int | str) -> int:
    return parse_size(shard_size, "shard_size")


def _policy(shard_size: int | str, samples: int | None) -> ShardSizePolicy:
    return ShardSizePolicy(max_bytes=_bytes_of(shard_size), max_samples=samples)


# -- which source it is -----------------------------------------------------------------------------


def _source(source: Any, labels: Any, shuffle: bool, seed: int, shard_size: int) -> Source:
    if isinstance(source, Source):
        return source
    if isinstance(source, os.PathLike):
        source = os.fspath(source)
    if isinstance(source, str):
        return _located(source, labels, shuffle, seed, shard_size * _SHARDS_OF_A_PART)
    if callable(source):
        source = source()
    if isinstance(source, Mapping) or not hasattr(source, "__iter__"):
        raise ConfigError(
            f"cannot pack {type(source).__name__}",
            hint="a folder, a URL, Parquet files, a datasets.Dataset, or an iterable of samples; of a DatasetDict, one split",
        )
    if hasattr(source, "features") and hasattr(source, "__len__"):
        return of_rows(source, shuffle=shuffle, seed=seed, part_rows=_rows_of_a_part(len(source)))
    if isinstance(source, (list, tuple)) and source and all(isinstance(s, str) and s.endswith(".parquet") for s in source):
        return of_parquet(list(source), _open_file)
    return of_iterable(source)


def _rows_of_a_part(rows: int) -> int:
    return max(256, min(16384, -(-rows // 64)))


def _located(source: str, labels: Any, shuffle: bool, seed: int, part_bytes: int) -> Source:
    local = ObjectURL.parse(source)
    path = local.key if local.scheme == "file" else None
    if source.endswith(".parquet"):
        return of_parquet([source], _open_file)
    if _RECORDS.search(source):
        store, keys = one_store(list(expand_braces(source, keep_escapes=True)), None, {}, patterns=True)
        return of_tfrecord(
            [str(ObjectURL.parse(store.url).joined(key)) for key in keys if not key.endswith(".idx")], _open_file
        )
    if path is not None and os.path.isdir(path):
        names = sorted(name for name in os.listdir(path) if not name.startswith((".", "_")))
        if any(name.endswith(".parquet") for name in names):
            return of_parquet([os.path.join(path, name) for name in names if name.endswith(".parquet")], _open_file)
        if names and all(_RECORDS.search(name) or name.endswith(".idx") for name in names):
            return of_tfrecord([os.path.join(path, name) for name in names if not name.endswith(".idx")], _open_file)
        if not ("index.json" in names or MANIFEST in names or _holds_shards(path)):
            return of_folder(path, labels, shuffle=shuffle, seed=seed, part_bytes=part_bytes)
    elif path is not None and not any(mark in source for mark in "*{") and not os.path.exists(path):
        return of_folder(path, labels, shuffle=shuffle, seed=seed, part_bytes=part_bytes)  # says that there is none
    return _of_dataset(source, part_bytes)


def _holds_shards(folder: str) -> bool:
    """Whether tar shards lie in `folder`, or in folders below it.

    Raises:
        ConfigError: beside them there is what could be samples, too.
    """
    shards, others = None, None
    for at, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith((".", "_")))
        for name in sorted(names):
            if name.endswith(_SHARDS):
                shards = shards or os.path.join(at, name)
            elif "." in name.strip(".") and not name.startswith((".", "_")) and not name.endswith(_BESIDE_SHARDS):
                others = others or os.path.join(at, name)
            if shards and others:
                raise ConfigError(
                    f"it holds tar shards ({shards}) and other files ({others}): which of them are the samples?",
                    op="pack", url=folder, hint="give a folder that holds one kind, or a pattern such as FOLDER/**/*.tar",
                )  # fmt: skip
    return shards is not None


def _open_file(path: str) -> Any:
    where = ObjectURL.parse(path)
    folder, _, name = where.key.rpartition("/")
    root = f"file://{folder or '/'}" if where.scheme == "file" else f"{where.scheme}://{where.bucket}/{folder}"
    return open_store(root).open(name)


def _of_dataset(url: str, part_bytes: int) -> Source:
    """The samples of another dataset, as they stand there, in runs of neighbours."""
    grouped: dict[str, Any] = {"group": "webdataset"}
    try:
        dataset = open_dataset(url, **grouped)
    except ConfigError:  # MDS has samples of its own
        try:
            dataset = open_dataset(url)
        except (ShardReadError, ObjectNotFoundError):
            compressed = compressed_mds(url)
            if compressed is None:
                raise
            return _of_compressed(url, compressed)
    count = len(dataset)
    parts = max(1, min(count, -(-dataset.catalog.total_bytes // part_bytes)))
    edges = [count * number // parts for number in range(parts + 1)]
    pairs = itertools.pairwise(edges) if count else ()
    runs = [partial(_of_run, dataset.slice(first, stop).without_store({}), first) for first, stop in pairs]
    return Source(runs, count, dataset.catalog.total_bytes, dataset.catalog.digest)


def _of_compressed(url: str, shards: Sequence[CompressedMdsShard]) -> Source:
    """The samples of compressed MDS shards; a part is a shard, since none can be read in pieces."""
    told = [(shard.key, shard.size, shard.etag, shard.plain.samples) for shard in shards]
    digest = hashlib.sha256(json.dumps(told).encode()).hexdigest()
    parts = [partial(_of_compressed_shard, url, shard) for shard in shards]
    return Source(parts, sum(s.plain.samples for s in shards), sum(s.plain.size for s in shards), digest)


def _of_compressed_shard(url: str, shard: CompressedMdsShard) -> Iterator[Sample]:
    for number, row in enumerate(rows_of_compressed_mds(url, shard), shard.plain.first):
        yield as_sample(dict(column_member(name, value) for name, value in row.items()), number)


def _of_run(make: Callable[[], Dataset], number: int) -> Iterator[Sample]:
    dataset = make()
    for batch in Loader(dataset, batch_size=64, shuffle="none", tail="short"):
        for sample in batch:
            if not isinstance(sample, Mapping):
                raise ConfigError("its samples are whole objects", url=dataset.name, hint="pack the folder they lie in")
            yield as_sample(dict(column_member(name, value) for name, value in sample.items()), number)
            number += 1


# -- writing ----------------------------------------------------------------------------------------


@dataclass
class _Run:
    store: ObjectStore
    source: Source
    options: dict[str, Any]
    executor: TaskExecutor | None
    exists: Exists
    verify: Verify
    progress: ShowProgress
    place: tuple[str, dict[str, Any]]
    name: str = field(default_factory=lambda: os.urandom(4).hex())
    """Of this pack: begins the names of its folders of shards, so that it never writes into another one's."""

    def run(self) -> PackReport:
        check_progress(self.progress)
        if self.exists not in ("resume", "error", "replace"):
            raise ConfigError(f"exists cannot be {self.exists!r}", hint="resume, error or replace")
        if self.verify not in ("full", "index", "none"):
            raise ConfigError(f"verify cannot be {self.verify!r}", hint="full, index or none")
        there = self._record()
        published = self.store.exists(MANIFEST)
        same = there is not None and self.source.digest is not None and there["digest"] == self._digest()
        if published and self.exists == "error":
            raise self._taken("")
        if published and there is not None and same and there["state"] == "done":
            return self._report(entries_of(self.store, MANIFEST), len(self.source.parts), True)
        if published and not same and self.exists != "replace":
            raise self._taken("it was not made by pack" if there is None else "of another source, or with other options")
        old = entries_of(self.store, MANIFEST) if published else []
        if same and there is not None:
            self.name = there["name"]
        else:
            self._clear(there)
            self._write_record("packing", 0)
        done = self._parts_there()
        with showing(self.progress, "pack", "samples") as told:
            self._write([n for n in range(len(self.source.parts)) if n not in done], len(done), told)
        manifests = self._parts_there()
        entries = [entry for number in range(len(self.source.parts)) for entry in entries_of(self.store, manifests[number])]
        if not entries:
            self._clear(self._record())
            self.store.delete(_RECORD)
            raise ConfigError("there is nothing to pack: no samples came", hint="is the iterable used up?")
        if self.source.classes is not None:
            self.store.put(_CLASSES, json.dumps(self.source.classes, indent=1, ensure_ascii=False).encode() + b"\n")
        elif old:
            self.store.delete(_CLASSES)
        with ManifestWriter(self.store, MANIFEST, mode="overwrite") as writer:
            for entry in entries:
                writer.add_entry(entry)
        report = self._report(entries, len(done), False)
        self._write_record("done", report.samples)
        kept = {archive_of(entry) for entry in entries}
        gone = [archive_of(entry) for entry in old if archive_of(entry) not in kept]
        leftover = [key for archive in gone if archive for key in (archive, f"{archive}.idx")]
        self.store.delete_many([*leftover, *manifests.values()])
        drop_tries(self.store, f"shards/{self.name}", entries)  # that were killed, or came second
        return report

    def _taken(self, why: str) -> ObjectExistsError:
        text = "there is a dataset already" + (f": {why}" if why else "")
        return ObjectExistsError(
            text, op="pack", url=self.store.url, hint='pack it elsewhere, or say exists="replace" (--overwrite)'
        )

    def _digest(self) -> str:
        facts = [_VERSION, self.source.digest, repr(self.options["shard_size"]), self.options["shard_compression"]]
        return hashlib.sha256(repr([*facts, len(self.source.parts)]).encode()).hexdigest()

    def _record(self) -> dict[str, Any] | None:
        try:
            data = self.store.get(_RECORD)
        except ObjectNotFoundError:
            return None
        if not json_seal_holds(data):
            raise FormatError("the record of a pack cannot be read", url=f"{self.store.url}/{_RECORD}", hint="--overwrite")
        found: dict[str, Any] = json.loads(data)
        return found

    def _write_record(self, state: str, samples: int) -> None:
        told = {"version": _VERSION, "state": state, "name": self.name, "digest": self._digest(), "samples": samples}
        self.store.put(_RECORD, seal_json(json.dumps(told, separators=(",", ":")).encode()))

    def _clear(self, there: dict[str, Any] | None) -> None:
        """What an interrupted pack has left: nobody can have read it."""
        self.store.delete_many([entry.key for entry in self.store.list(_PARTS)])
        if there is not None and there["state"] != "done":
            self.store.delete_many([entry.key for entry in self.store.list(f"shards/{there['name']}-")])

    def _parts_there(self) -> dict[int, str]:
        """Keys of the manifests of the parts that are done."""
        found: dict[int, str] = {}
        for entry in self.store.list(_PARTS):
            name, _, number = entry.key[len(_PARTS) :].removesuffix(".jsonl").rpartition("-")
            if name in (self.name, "") and number.isdigit() and entry.key.endswith(".jsonl"):  # earlier they had no name
                found[int(number)] = entry.key
        return found

    def _write(self, parts: Sequence[int], resumed: int, report: Report | None) -> None:
        """All parts that are missing."""
        total = self.source.samples
        state = [0, 0]

        def count(samples: int, size: int) -> None:
            state[0] += samples
            state[1] += size
            if report is not None:
                report(state[0], total if not resumed else None, state[1])

        if self.executor is None:
            for number in parts:
                key, folder = _part(self.name, number), _folder(self.name, number)
                write_part(self.store, self.source.parts[number](), key, folder, self.options, count)
            return
        task = partial(_write_elsewhere, self.place, self.name, self.options)
        for _, (samples, size) in self.executor.run(task, [(number, self.source.parts[number]) for number in parts]):
            count(samples, size)

    def _report(self, entries: list[ManifestEntry], resumed: int, unchanged: bool) -> PackReport:
        manifest = f"{self.store.url}/{MANIFEST}"
        dataset = open_dataset(MANIFEST, store=self.store, group="webdataset")
        if self.verify != "none":
            self._check(entries, dataset)
        members = tuple(n for n in next(iter(Loader(dataset, batch_size=1, shuffle="none")))[0] if not n.startswith("__"))
        return PackReport(
            self.store.url,
            manifest,
            len(dataset),
            sum(int(shard.get("size_bytes") or 0) for shard in cast("list[dict[str, Any]]", entries)),
            len(entries),
            self.source.classes or {},
            self.source.left_out,
            resumed,
            unchanged,
            self.verify,
            members,
        )

    def _check(self, entries: list[ManifestEntry], dataset: Any) -> None:
        found = check_dataset(dataset)
        url = self.store.url
        if found.errors:
            shard, error = next(iter(found.errors.items()))
            raise IntegrityError(f"{len(found.errors):,} shards cannot be read: {shard}: {error.message}", url=url)
        if found.torn:
            raise IntegrityError(f"{len(found.torn):,} samples are torn: {found.torn[0]}", url=url)
        for entry in entries:
            if (size := self.store.head(archive_of(entry)).size) != entry.get("size_bytes"):
                raise IntegrityError(f"{archive_of(entry)} has {size} bytes, not {entry.get('size_bytes')}", url=url)
        if self.source.samples is not None and found.samples != self.source.samples:
            raise IntegrityError(f"{found.samples:,} samples are there, {self.source.samples:,} were packed", url=url)
        if self.verify == "full":
            for _ in Loader(dataset, batch_size=64, shuffle="none", tail="short"):
                pass  # each member's CRC32C is checked on the way


def _part(name: str, number: int) -> str:
    return f"{_PARTS}{name}-{number:06d}.jsonl"


def _folder(name: str, number: int) -> str:
    return f"shards/{name}-{number:06d}"


def _write_elsewhere(
    place: tuple[str, dict[str, Any]],
    name: str,
    options: dict[str, Any],
    part: tuple[int, Callable[[], Iterable[Sample]]],
) -> tuple[int, int]:
    """A task: writes one part, and gives the samples and bytes of it."""
    url, keywords = place
    written = [0, 0]

    def count(samples: int, size: int) -> None:
        written[0] += samples
        written[1] += size

    number, samples = part
    with open_store(url, **keywords) as store:
        write_part(store, samples(), _part(name, number), _folder(name, number), options, count)
    return written[0], written[1]
