"""What a dataset holds, for a person who looks: samples, shards, members, sizes, classes, some pictures. Bounded reading."""

from __future__ import annotations

import base64
import io
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from s3loader.errors import ObjectNotFoundError, S3LoaderError
from s3loader.loader.dataset import Dataset
from s3loader.loader.layout import Layout, LooseRun, Shard
from s3loader.loader.loader import Loader
from s3loader.loader.reading import read_samples
from s3loader.pages import bars, escaped, facts, page, table
from s3loader.shard.samples import extension_of, sample_key
from s3loader.units import KIB, format_size

__all__ = ["DatasetView", "MemberKind", "Picture", "SizeBin", "classes_of", "dataset_page", "view_dataset"]

_IMAGES: Final = ("jpg", "jpeg", "png", "webp", "gif")
_MAGIC: Final = ((b"\xff\xd8\xff", "image/jpeg"), (b"\x89PNG\r\n\x1a\n", "image/png"), (b"GIF8", "image/gif"))
_SMALL: Final = 64 * KIB
"""Bytes of an original that is shown as it is, where Pillow is not installed."""
_THUMBNAIL: Final = 224
_BATCH: Final = 256


@dataclass(frozen=True, slots=True)
class MemberKind:
    """Members of one extension, in what was looked at."""

    extension: str
    count: int
    bytes: int


@dataclass(frozen=True, slots=True)
class SizeBin:
    """Samples of `low` to `high` (excluded) bytes, in what was looked at."""

    low: int
    high: int
    count: int


@dataclass(frozen=True, slots=True)
class Picture:
    """An image of a sample, small."""

    key: str
    label: str
    mime: str
    data: bytes


@dataclass(frozen=True, slots=True)
class DatasetView:
    """What `view_dataset` found."""

    name: str
    engine: str
    samples: int
    shards: int
    objects: int
    """Loose ones."""
    stored: int | None
    """Bytes of all shards and objects, where they are known."""
    looked_at: int
    """Samples whose members and sizes were looked at; all of them where it is `samples`."""
    members: tuple[MemberKind, ...]
    sizes: tuple[SizeBin, ...]
    smallest: int
    median: int
    largest: int
    """Bytes of a sample, in what was looked at."""
    classes: tuple[tuple[str, int], ...]
    """Name or number of each class, and samples of it in what was read; the most frequent first."""
    labels_read: int
    """Samples whose class was read."""
    explain: tuple[tuple[str, str], ...]
    """What an epoch costs, as `Loader.explain` says."""
    notes: tuple[str, ...]
    pictures: tuple[Picture, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """For JSON; of pictures the keys and labels."""
        found = {name: getattr(self, name) for name in self.__slots__}
        found["members"] = {kind.extension: {"count": kind.count, "bytes": kind.bytes} for kind in self.members}
        found["sizes"] = [[one.low, one.high, one.count] for one in self.sizes]
        found["classes"] = dict(self.classes)
        found["explain"] = dict(self.explain)
        found["pictures"] = [[picture.key, picture.label] for picture in self.pictures]
        return found


def view_dataset(
    dataset: Dataset,
    *,
    batch_size: int = 64,
    shuffle: Any = "block",
    look: int = 100_000,
    labels: int = 2000,
    pictures: int = 0,
) -> DatasetView:
    """Look at a dataset: indexes of shards, some labels, some pictures.

    Args:
        dataset: An open one, as of `open_for_inspection`.
        batch_size: Of the epoch that is explained.
        shuffle: Likewise.
        look: Samples whose members and sizes are looked at, about; they are spread over the dataset.
        labels: Samples whose member ``cls`` is read, likewise.
        pictures: Samples whose image is read, likewise.

    Raises:
        S3LoaderError: nothing can be read.
    """
    parts = _spread_parts(dataset, look)
    sizes, counts, volumes, folders, notes = _looked(dataset, parts)
    members = tuple(MemberKind(name, counts[name], volumes[name]) for name in sorted(counts, key=lambda n: (-counts[n], n)))
    names = {number: name for name, number in (classes_of(dataset) or {}).items()}
    found, read = _labels(dataset, counts, names, labels, notes)
    if not found and len(folders) > 1:
        found, read = folders, len(sizes)
    shown = _pictures(dataset, counts, names, pictures, notes) if pictures else []
    explained = Loader(dataset, batch_size=batch_size, shuffle=shuffle).explain()
    notes += [note for note in dataset.notes if note not in explained.notes]
    shards = sum(isinstance(part, Shard) for part in dataset.parts)
    loose = [part for part in dataset.parts if isinstance(part, LooseRun)]
    return DatasetView(
        dataset.name,
        dataset.store.engine,
        len(dataset),
        shards,
        sum(len(part.keys) for part in loose),
        dataset.stored_bytes if shards else (_known(loose) or None),
        len(sizes),
        members,
        tuple(_bins(sizes)),
        int(sizes.min()) if len(sizes) else 0,
        int(np.median(sizes)) if len(sizes) else 0,
        int(sizes.max()) if len(sizes) else 0,
        tuple(sorted(found.items(), key=lambda item: (-item[1], item[0]))),
        read,
        tuple(explained.rows()),
        tuple(notes),
        tuple(shown),
    )


def classes_of(dataset: Dataset) -> dict[str, int] | None:
    """Number of each class by name, as ``classes.json`` beside the dataset says, if there is one."""
    keys = [part.key if isinstance(part, Shard) else part.keys[0] for part in dataset.parts[:1]]
    folder = keys[0].rpartition("/")[0] if keys else ""
    folders = [folder]
    while folder and len(folders) < 4:  # shards lie up to two folders below the manifest
        folder = folder.rpartition("/")[0]
        folders.append(folder)
    for folder in folders:
        try:
            found = json.loads(dataset.store.get(f"{folder}/classes.json" if folder else "classes.json"))
        except (ObjectNotFoundError, ValueError):
            continue
        if isinstance(found, dict) and all(type(number) is int for number in found.values()):
            return found
    return None


def _known(loose: Sequence[LooseRun]) -> int:
    return sum(int(np.maximum(run.sizes, 0).sum()) for run in loose)


# -- indexes ----------------------------------------------------------------------------------------


def _spread_parts(dataset: Dataset, look: int) -> list[int]:
    """Parts from the first to the last that hold about so many samples together."""
    full = [number for number, count in enumerate(dataset.catalog.counts.tolist()) if count]
    if len(dataset) <= look:
        return full
    some = max(1, look * len(full) // len(dataset))
    return [full[at] for at in np.unique(np.linspace(0, len(full) - 1, some).astype(int)).tolist()]


def _looked(
    dataset: Dataset, parts: Sequence[int]
) -> tuple[np.ndarray[Any, np.dtype[np.int64]], Counter[str], Counter[str], dict[str, int], list[str]]:
    """Bytes of each sample, members and their bytes by extension, samples by first folder of loose ones, and notes."""
    sizes: list[np.ndarray[Any, np.dtype[np.int64]]] = []
    counts: Counter[str] = Counter()
    volumes: Counter[str] = Counter()
    folders: Counter[str] = Counter()
    notes: list[str] = []
    for low in range(0, len(parts), 16):
        for number, layout in dataset.layouts(parts[low : low + 16]).items():
            if isinstance(layout, S3LoaderError):
                notes.append(f"part {number} cannot be read: {layout.message}")
                continue
            known = np.maximum(layout.sizes, 0).astype(np.int64)
            sizes.append(np.add.reduceat(known, layout.first[:-1]) if layout.samples else known[:0])
            _count(dataset, layout, known, counts, volumes, folders)
    return np.concatenate(sizes) if sizes else np.zeros(0, np.int64), counts, volumes, dict(folders), notes


def _count(
    dataset: Dataset, layout: Layout, sizes: Any, counts: Counter[str], volumes: Counter[str], folders: Counter[str]
) -> None:
    names = [layout.name(member) for member in range(int(layout.first[-1]))]
    for name, size in zip(names, sizes.tolist(), strict=True):
        extension = extension_of(name)
        counts[extension] += 1
        volumes[extension] += size
    if layout.loose and dataset.group is not None:
        keys = [sample_key(names[member]) for member in layout.first[:-1].tolist()]
        common = _common_folder(keys)
        for key in keys:
            folder, slash, _ = key[len(common) :].partition("/")
            folders[folder if slash else ""] += 1


def _common_folder(keys: Sequence[str]) -> str:
    low, high = min(keys), max(keys)
    same = next((at for at, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), min(len(low), len(high)))
    return low[: low.rfind("/", 0, same) + 1]


def _bins(sizes: Any) -> list[SizeBin]:
    """By powers of two."""
    if not len(sizes):
        return []
    powers = np.frexp(np.maximum(sizes, 1).astype(np.float64))[1] - 1
    counts = np.bincount(powers)
    low = int(powers.min())
    return [SizeBin(1 << p if p else 0, 1 << (p + 1), int(counts[p])) for p in range(low, len(counts))]


# -- contents ---------------------------------------------------------------------------------------


def _spread(dataset: Dataset, some: int) -> Any:
    return np.unique(np.linspace(0, len(dataset) - 1, min(some, len(dataset))).astype(np.int64))


def _labels(
    dataset: Dataset, counts: Mapping[str, int], names: Mapping[int, str], labels: int, notes: list[str]
) -> tuple[dict[str, int], int]:
    found: Counter[str] = Counter()
    if dataset.group is None or not counts.get("cls") or not labels:
        return {}, 0
    only = dataset.only(["cls"])
    wanted = _spread(dataset, labels)
    failed = 0
    for low in range(0, len(wanted), _BATCH):
        for sample in read_samples(only, wanted[low : low + _BATCH]):
            if isinstance(sample, Mapping):
                if "cls" in sample:
                    found[_label(sample["cls"], names)] += 1
            else:
                failed += 1
    if failed:
        notes.append(f"{failed:,} labels cannot be read")
    return dict(found), sum(found.values())


def _label(data: Any, names: Mapping[int, str]) -> str:
    text = bytes(data).decode("utf-8", "backslashreplace").strip()
    return names.get(int(text), text) if text.isdecimal() and len(text) < 19 else text[:80]


def _pictures(
    dataset: Dataset, counts: Mapping[str, int], names: Mapping[int, str], some: int, notes: list[str]
) -> list[Picture]:
    kinds = [extension for extension in counts if extension.lower().rpartition(".")[2] in _IMAGES]
    if dataset.group is None or not kinds:
        return []
    only = dataset.only([*kinds, *(["cls"] if counts.get("cls") else [])])
    found: list[Picture] = []
    left_out = 0
    for sample in read_samples(only, _spread(dataset, some)):
        if not isinstance(sample, Mapping):
            left_out += 1
            continue
        data = next((bytes(sample[kind]) for kind in kinds if kind in sample), b"")
        small = _small(data)
        if small is None:
            left_out += 1
            continue
        label = _label(sample["cls"], names) if "cls" in sample else ""
        found.append(Picture(str(sample.get("__key__", "")), label, *small))
    if left_out:
        notes.append(f"{left_out:,} pictures are not shown: they cannot be read, or are large and Pillow is not installed")
    return found


def _small(data: bytes) -> tuple[str, bytes] | None:
    """Type and bytes of a picture that a page may hold: a thumbnail with Pillow, else the original where it is small."""
    try:
        from PIL import Image
    except ImportError:
        mime = next((mime for magic, mime in _MAGIC if data.startswith(magic)), None)
        mime = "image/webp" if data[:4] == b"RIFF" and data[8:12] == b"WEBP" else mime
        return None if mime is None or len(data) > _SMALL else (mime, data)
    out = io.BytesIO()
    try:
        with Image.open(io.BytesIO(data), formats=["JPEG", "PNG", "GIF", "WEBP"]) as image:
            image.draft("RGB", (_THUMBNAIL, _THUMBNAIL))
            image.thumbnail((_THUMBNAIL, _THUMBNAIL))
            flat = image.convert("RGBA")
            paper = Image.new("RGBA", flat.size, "white")
            paper.alpha_composite(flat)
            paper.convert("RGB").save(out, "JPEG", quality=82)
    except Exception:  # noqa: BLE001 - of a library that reads what anybody may have stored; the page says how many
        return None
    return "image/jpeg", out.getvalue()


# -- as one HTML page ------------------------------------------------------------------------------

_MOST_CLASSES = 40


def dataset_page(view: DatasetView) -> str:
    """The page. The figures stand in it as JSON too, in the element ``data``."""
    figures = [("samples", f"{view.samples:,}")]
    figures += [("shards", f"{view.shards:,}")] if view.shards else [("objects", f"{view.objects:,}")]
    figures += [("stored", "?" if view.stored is None else format_size(view.stored))]
    figures += [("classes", f"{len(view.classes):,}")] if view.classes else []
    figures += [("bytes of a sample, median", format_size(view.median))]
    parts = [f"<p>engine {escaped(view.engine)}</p>", facts(figures)]
    if view.pictures:
        parts += ["<h2>Pictures</h2>", '<div class="pictures">', *map(_figure, view.pictures), "</div>"]
    looked = "" if view.looked_at == view.samples else f", of {view.looked_at:,} samples that were looked at"
    if view.classes:
        read = "" if view.labels_read == view.samples else f", of {view.labels_read:,} labels that were read"
        shown = view.classes[:_MOST_CLASSES]
        parts += [f"<h2>Classes{read}</h2>", bars([(name or "(none)", count, f"{count:,}") for name, count in shown])]
        rest = view.classes[_MOST_CLASSES:]
        if rest:
            parts.append(f"<p>and {len(rest):,} more classes with {sum(count for _, count in rest):,} samples</p>")
    sizes = [(f"{format_size(one.low)} to {format_size(one.high)}", one.count, f"{one.count:,}") for one in view.sizes]
    parts += [f"<h2>Sizes of samples{looked}</h2>", bars(sizes)]
    rows = [(kind.extension or "(none)", f"{kind.count:,}", format_size(kind.bytes)) for kind in view.members]
    parts += [f"<h2>Members{looked}</h2>", table(("", "number", "bytes"), rows)]
    parts += ["<h2>An epoch</h2>", table(("", ""), view.explain, text=1)]
    parts += [f"<p>{escaped(note)}</p>" for note in view.notes]
    return page(view.name, parts, view.as_dict())


def _figure(picture: Picture) -> str:
    data = base64.b64encode(picture.data).decode()
    label = f"<b>{escaped(picture.label)}</b> " if picture.label else ""
    return (
        f'<figure><img alt="{escaped(picture.key)}" src="data:{picture.mime};base64,{data}">'
        f"<figcaption>{label}{escaped(picture.key)}</figcaption></figure>"
    )
