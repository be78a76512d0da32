"""What can be packed, as samples in parts that can be written one without the other."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from functools import partial
from typing import Any, Final, TypeAlias

from s3loader.errors import ConfigError, FormatError, SourceNotFoundError
from s3loader.loader.tf_example import decode_example
from s3loader.shard.tfrecord import read_records

__all__ = ["Sample", "Source", "of_folder", "of_iterable", "of_parquet", "of_rows", "of_tfrecord"]

Sample: TypeAlias = tuple[str, Mapping[str, bytes | str]]
"""A key, and content by extension: bytes, or the path of a local file."""

_IMAGES: Final = frozenset(["jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "pgm", "jp2", "avif", "heic"])
_SPLITS: Final = frozenset(["train", "training", "val", "valid", "validation", "test", "testing", "dev"])
_FILE_COLUMNS: Final = ("file", "file_name", "filename", "path", "image", "image_path", "filepath")
_LABEL_COLUMNS: Final = ("label", "class", "cls", "category", "target")
_MAGIC: Final = ((b"\xff\xd8\xff", "jpg"), (b"\x89PNG", "png"), (b"GIF8", "gif"), (b"BM", "bmp"), (b"II*\0", "tif"))
_UNSAFE: Final = re.compile(r"[^\w\-/ ]+")


@dataclass
class Source:
    """Samples, in parts."""

    parts: Sequence[Callable[[], Iterable[Sample]]]
    """Each gives its samples; may be called in another process."""
    samples: int | None = None
    """Of all parts; None: nobody knows before they are written."""
    bytes: int | None = None
    digest: str | None = None
    """Of what is to be packed; None: it cannot be told whether two are the same, and nothing is resumed."""
    classes: dict[str, int] | None = None
    """Number of each class, by name."""
    per_class: dict[str, int] = field(default_factory=dict)
    """Samples of each class."""
    left_out: dict[str, list[str]] = field(default_factory=dict)
    """Files that are not packed, by reason."""
    largest: int = 0
    """Bytes of the largest sample."""


@dataclass(frozen=True, slots=True)
class _File:
    path: str
    name: str
    """Relative to the folder, with slashes."""
    size: int
    changed: int


# -- folders ----------------------------------------------------------------------------------------


def of_folder(folder: str, labels: Any, *, shuffle: bool, seed: int, part_bytes: int) -> Source:
    """The files of a local folder.

    Args:
        folder: Its path.
        labels: ``"auto"`` (names of the first folders, where all files lie in such), ``"folders"``, None, the path of a CSV or
            JSONL file, or a mapping from file name to label.
        shuffle: Whether the samples are packed in an order drawn from `seed`; else in that of their names.
        seed: Of that order.
        part_bytes: Bytes of one part, about.

    Raises:
        SourceNotFoundError: there is no such folder, or a file that the labels name is missing.
        ConfigError: there is nothing to pack, or the labels do not fit.
        FormatError: the file of labels cannot be read.
    """
    if not os.path.isdir(folder):
        raise SourceNotFoundError("there is no such folder", op="pack", url=folder, hint="check the path")
    left_out: dict[str, list[str]] = {}
    labels_path = labels if isinstance(labels, (str, os.PathLike)) and labels not in ("auto", "folders") else None
    files = _files_of(folder, left_out, None if labels_path is None else os.path.abspath(os.fspath(labels_path)))
    groups = _groups(files)
    table = _labels_of(folder, labels, labels_path, groups, left_out)
    if not groups:
        raise ConfigError("there is nothing to pack", url=folder, op="pack", hint="no file there has a name with an extension")
    classes = _classes(row.label for row in table.values() if row.label is not None)
    specs: list[tuple[str, dict[str, bytes | str], int, list[_File]]] = []
    per_class: dict[str, int] = {}
    for key, members in groups.items():
        values: dict[str, bytes | str] = {extension: file.path for extension, file in members.items()}
        row = table.get(key)
        if row is not None and row.label is not None:
            number = classes[row.label] if isinstance(row.label, str) else row.label
            per_class[str(row.label)] = per_class.get(str(row.label), 0) + 1
            values.setdefault("cls", str(number).encode())
        if row is not None and row.rest:
            values.setdefault("json", json.dumps(row.rest, ensure_ascii=False, sort_keys=True).encode())
        specs.append((key, values, sum(file.size for file in members.values()), list(members.values())))
    if shuffle:
        random.Random(seed).shuffle(specs)
    digest = hashlib.sha256()
    for key, values, _, some in specs:
        facts = [key, {e: v.decode() for e, v in values.items() if isinstance(v, bytes)}]
        digest.update(repr([*facts, [(file.name, file.size, file.changed) for file in some]]).encode("utf-8", "surrogatepass"))
    parts: list[list[Sample]] = [[]]
    filled = 0
    for key, values, size, _ in specs:
        if parts[-1] and filled + size > part_bytes:
            parts.append([])
            filled = 0
        parts[-1].append((key, values))
        filled += size
    return Source(
        [partial(iter, part) for part in parts],
        len(specs),
        sum(size for _, _, size, _ in specs),
        digest.hexdigest(),
        classes or None,
        per_class,
        left_out,
        max(size for _, _, size, _ in specs),
    )


def _files_of(folder: str, left_out: dict[str, list[str]], apart: str | None) -> list[_File]:
    found: list[_File] = []
    for at, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            path = os.path.join(at, name)
            relative = os.path.relpath(path, folder).replace(os.sep, "/")
            if os.path.abspath(path) == apart:
                continue
            reason = "hidden" if name.startswith(".") else "without extension" if "." not in name.rstrip(".") else None
            if reason is None and not os.path.isfile(path):
                reason = "no regular file"
            if reason is not None:
                left_out.setdefault(reason, []).append(relative)
                continue
            facts = os.stat(path)
            found.append(_File(path, relative, facts.st_size, facts.st_mtime_ns))
    return found


def _groups(files: Iterable[_File]) -> dict[str, dict[str, _File]]:
    """Members by key: files of one stem in one folder. Of several images of a stem each is a sample of its own."""
    stems: dict[str, list[tuple[str, _File]]] = {}
    for file in files:
        stem, _, extension = file.name.rpartition(".")
        stems.setdefault(stem, []).append((extension.lower(), file))
    groups: dict[str, dict[str, _File]] = {}
    for stem, members in stems.items():
        images = [member for member in members if member[0] in _IMAGES]
        others = [member for member in members if member[0] not in _IMAGES]
        sets = [dict(others) | dict([image]) for image in images] if len(images) > 1 else [dict(members)]
        for some in sets:
            key = safe_key(stem)
            if key in groups or len(sets) > 1:
                image = next((extension for extension in some if extension in _IMAGES), next(iter(some)))
                key = f"{key}-{image}"
            number = 2
            while key in groups:
                key, number = f"{safe_key(stem)}-{number}", number + 1
            groups[key] = some
    return groups


def safe_key(name: str) -> str:
    """`name` as a sample's key: without dots, relative, only of letters, digits, ``-``, ``_``, blanks and slashes."""
    parts = [_UNSAFE.sub("_", part).strip() for part in name.split("/")]
    key = "/".join(part for part in parts if part) or "_"
    return f"x{key}" if key.startswith("__") else key  # readers leave out what begins so


@dataclass(frozen=True, slots=True)
class _Row:
    label: str | int | None
    rest: dict[str, Any]


def _labels_of(
    folder: str, labels: Any, path: Any, groups: dict[str, dict[str, _File]], left_out: dict[str, list[str]]
) -> dict[str, _Row]:
    """What is known of each sample, by key. Samples that a table does not name are taken out of `groups`."""
    if labels is None:
        return {}
    names = {next(iter(members.values())).name.partition("/")[0] for members in groups.values()}
    deep = bool(groups) and all("/" in file.name for members in groups.values() for file in members.values())
    if labels in ("auto", "folders"):
        if labels == "folders" and not deep:
            raise ConfigError("some files lie in no class's folder", url=folder, hint="put them in one, or leave labels out")
        if labels == "auto" and deep and names and {name.lower() for name in names} <= _SPLITS:
            first = sorted(names)[0]
            raise ConfigError(
                f"its folders are splits, not classes: {', '.join(sorted(names))}",
                url=folder,
                hint=f"pack each of them: s3loader pack {folder}/{first} URL/{first} (or --labels folders)",
            )
        if not deep:
            return {}
        return {key: _Row(next(iter(members.values())).name.partition("/")[0], {}) for key, members in groups.items()}
    rows = labels if isinstance(labels, Mapping) else _read_table(os.fspath(path), folder)
    by_file = {file.name: key for key, members in groups.items() for file in members.values()}
    table: dict[str, _Row] = {}
    missing = []
    for name, row in rows.items():
        key = by_file.get(os.path.normpath(str(name)).replace(os.sep, "/"))
        if key is None:
            missing.append(str(name))
        else:
            table[key] = row if isinstance(row, _Row) else _Row(_label(row), {})
    if missing:
        raise SourceNotFoundError(
            f"{len(missing):,} of the files that the labels name are not there: {', '.join(missing[:3])}",
            op="pack",
            url=folder,
            hint="names are relative to the folder that is packed",
        )
    for key in [key for key in groups if key not in table]:
        left_out.setdefault("without label", []).extend(file.name for file in groups.pop(key).values())
    return table


def _label(value: Any) -> str | int | None:
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    if isinstance(value, str):
        return int(value) if re.fullmatch(r"\d{1,18}", value.strip()) else value.strip()
    return int(value) if hasattr(value, "__index__") else str(value)


def _classes(labels: Iterable[str | int]) -> dict[str, int]:
    """Names are numbered in their order; labels that are numbers stay what they are."""
    some = set(labels)
    names = sorted(label for label in some if isinstance(label, str))
    if names and len(names) != len(some):
        raise ConfigError(
            f"labels are numbers and names: {names[0]!r} and {next(n for n in some if isinstance(n, int))}",
            hint="write all of them as one or the other",
        )
    return {name: number for number, name in enumerate(names)}


def _read_table(path: str, folder: str) -> dict[str, _Row]:
    """Rows of a CSV, TSV or JSONL file by the name of their file."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            if path.lower().endswith((".jsonl", ".ndjson", ".json")):
                rows = [json.loads(line) for line in file if line.strip()]
            else:
                rows = list(csv.DictReader(file, delimiter="\t" if path.lower().endswith(".tsv") else ","))
    except FileNotFoundError as error:
        raise SourceNotFoundError("no such file of labels", op="pack", url=path, hint="check the path") from error
    except (ValueError, csv.Error) as error:
        raise FormatError(f"the labels cannot be read: {error}", url=path, hint="a CSV with a header, or JSON lines") from error
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise FormatError("it holds no rows with names of columns", url=path, hint="a CSV with a header, or JSON lines")
    columns = {str(name).strip().lower(): name for name in rows[0]}
    named = next((columns[name] for name in _FILE_COLUMNS if name in columns), None)
    labelled = next((columns[name] for name in _LABEL_COLUMNS if name in columns), None)
    if named is None:
        raise FormatError(f"no column names the file: {', '.join(map(str, rows[0]))}", url=path, hint='call it "file"')
    return {
        str(row[named]): _Row(
            None if labelled is None else _label(row.get(labelled)),
            {str(name): value for name, value in row.items() if name not in (named, labelled) and name is not None},
        )
        for row in rows
    }


# -- rows -------------------------------------------------------------------------------------------


def of_rows(table: Any, *, shuffle: bool, seed: int, part_rows: int) -> Source:
    """A Hugging Face `datasets.Dataset`, or anything with a length whose items are mappings."""
    classes: dict[str, int] | None = None
    features = getattr(table, "features", None) or {}
    for name, feature in features.items():
        if type(feature).__name__ in ("Image", "Audio") and getattr(feature, "decode", False):
            table = table.cast_column(name, type(feature)(decode=False))
        names = getattr(feature, "names", None)
        if names and name.lower() in _LABEL_COLUMNS:
            classes = {str(label): number for number, label in enumerate(names)}
    order = list(range(len(table)))
    if not order:
        raise ConfigError("there is nothing to pack: it has no rows", hint="is it the right split?")
    if shuffle:
        random.Random(seed).shuffle(order)
    parts = [partial(_rows, table, order[at : at + part_rows]) for at in range(0, len(order), part_rows)]
    print_of = getattr(table, "_fingerprint", None)
    digest = hashlib.sha256(f"{print_of} {len(order)} {shuffle} {seed}".encode()).hexdigest() if print_of else None
    return Source(parts, len(order), None, digest, classes)


def _rows(table: Any, numbers: Sequence[int]) -> Iterator[Sample]:
    for number in numbers:
        yield row_sample(table[number], number)


def of_parquet(paths: Sequence[str], open_file: Callable[[str], Any]) -> Source:
    """Rows of Parquet files, a row group at a time; a row is a sample.

    Args:
        paths: Of the files.
        open_file: Opens one of them.
    """
    try:
        import pyarrow.parquet as pq  # type: ignore[import-not-found, import-untyped, unused-ignore]
    except ImportError:
        raise ConfigError("Parquet needs pyarrow", hint="pip install pyarrow") from None
    parts: list[Callable[[], Iterable[Sample]]] = []
    first = 0
    digest = hashlib.sha256()
    for path in paths:
        try:
            with open_file(path) as file:
                found = pq.ParquetFile(file).metadata
        except (ValueError, OSError) as error:
            if isinstance(error, ConfigError):
                raise
            raise FormatError(f"it is no Parquet file: {error}", url=path, hint="was it written to its end?") from error
        for group in range(found.num_row_groups):
            rows = found.row_group(group)
            digest.update(f"{path} {group} {rows.num_rows} {rows.total_byte_size}".encode())
            parts.append(partial(_row_group, open_file, path, group, first))
            first += rows.num_rows
    if not first:
        raise ConfigError("there is nothing to pack: no rows", hint="are these the right files?")
    return Source(parts, first, None, digest.hexdigest())


def _row_group(open_file: Callable[[str], Any], path: str, group: int, first: int) -> Iterator[Sample]:
    import pyarrow.parquet as pq  # type: ignore[import-not-found, import-untyped, unused-ignore]

    with open_file(path) as file:
        for batch in pq.ParquetFile(file).iter_batches(256, row_groups=[group]):
            for row in batch.to_pylist():
                yield row_sample(row, first)
                first += 1


def of_tfrecord(paths: Sequence[str], open_file: Callable[[str], Any]) -> Source:
    """Records of TFRecord files, plain or compressed, a file at a time; a record is a sample of one member: ``tfexample``,
    where the first record is a ``tf.train.Example``, else ``bin``.

    Args:
        paths: Of the files.
        open_file: Opens one of them.
    """
    digest = hashlib.sha256()
    extension = None
    total = 0
    for path in paths:
        with open_file(path) as file:
            size = file.seek(0, os.SEEK_END)
            digest.update(f"{path} {size}".encode("utf-8", "surrogatepass"))
            total += size
            if extension is None and size:
                file.seek(0)
                extension = _kind_of_record(next(read_records(_chunks(file), path), b""))
    if extension is None:
        raise ConfigError("there is nothing to pack: no records", hint="are these the right files?")
    return Source(
        [partial(_records, open_file, path, n, extension) for n, path in enumerate(paths)], None, total, digest.hexdigest()
    )


def _kind_of_record(data: bytes) -> str:
    try:
        return "tfexample" if decode_example(data) else "bin"
    except FormatError:
        return "bin"


def _records(open_file: Callable[[str], Any], path: str, file_number: int, extension: str) -> Iterator[Sample]:
    with open_file(path) as file:
        for number, data in enumerate(read_records(_chunks(file), path)):
            yield f"{file_number:05d}-{number:09d}", {extension: data}


def _chunks(file: Any) -> Iterator[bytes]:
    return iter(lambda: file.read(1 << 20), b"")


def of_iterable(samples: Iterable[Any]) -> Source:
    """Samples as they come: mappings, or pairs of a key and a mapping."""
    return Source([partial(_numbered, samples)])


def _numbered(samples: Iterable[Any]) -> Iterator[Sample]:
    for number, sample in enumerate(samples):
        yield as_sample(sample, number)


def as_sample(sample: Any, number: int | str) -> Sample:
    """What a function or iterable of the user gives, as a sample.

    Raises:
        ConfigError: it is none.
    """
    name = number if isinstance(number, str) else f"{number:09d}"
    if isinstance(sample, tuple) and len(sample) == 2 and isinstance(sample[0], str) and isinstance(sample[1], Mapping):
        return sample[0], _values(sample[1], sample[0])
    if isinstance(sample, Mapping):
        key = str(sample.get("__key__", name))
        return key, _values({str(n): v for n, v in sample.items() if not str(n).startswith("__")}, key)
    if isinstance(sample, (bytes, bytearray, memoryview)):
        return name, {"bin": bytes(sample)}
    raise ConfigError(
        f"not a sample: {type(sample).__name__}",
        hint='a sample is {"jpg": bytes, "cls": 3} (with "__key__", if you like), or (key, {...})',
    )


def column_member(name: str, value: Any) -> tuple[str, Any]:
    """Name and value of the member that keeps a column of another dataset: an array as ``NAME.npy``, what only JSON can say as
    ``NAME.json``, all else under the column's name."""
    if isinstance(value, memoryview):
        return name, bytes(value)
    if getattr(value, "ndim", 0):
        return (name if name.lower().endswith("npy") else f"{name}.npy"), value
    if value is None or isinstance(value, (Mapping, list)):
        data = json.dumps(value, ensure_ascii=False).encode()
        return (name if name.lower().endswith("json") else f"{name}.json"), data
    return name, str(value) if isinstance(value, Decimal) else value


def _values(values: Mapping[str, Any], key: str) -> dict[str, bytes | str]:
    return {
        extension.lower(): _encoded(extension.lower(), value, key) for extension, value in values.items() if value is not None
    }


def _encoded(extension: str, value: Any, key: str) -> bytes | str:
    """Content of a member: bytes as they are, numbers and texts as text, arrays as ``.npy``, the rest as JSON."""
    if isinstance(value, (bytes, bytearray, memoryview)):
        return bytes(value)
    if isinstance(value, os.PathLike):
        return os.fsdecode(value)
    last = extension.rpartition(".")[2]
    if last == "json":
        return json.dumps(value, ensure_ascii=False, default=_plain).encode()
    if isinstance(value, str):
        return value.encode()
    if last == "npy":
        import io

        import numpy as np

        out = io.BytesIO()
        np.save(out, np.asarray(value), allow_pickle=False)
        return out.getvalue()
    if getattr(value, "ndim", None) == 0:  # a scalar of numpy
        value = value.item()
    if isinstance(value, (bool, int, float)) or (hasattr(value, "__index__") and not hasattr(value, "shape")):
        return str(int(value) if isinstance(value, bool) or hasattr(value, "__index__") else value).encode()
    raise ConfigError(
        f"member {extension!r} of sample {key!r} cannot be {type(value).__name__}",
        hint='give bytes, a pathlib.Path, text or a number; "json" takes anything JSON can say, "npy" an array',
    )


def row_sample(row: Mapping[str, Any], number: int) -> Sample:
    """A row of a table: what holds bytes is a member of its kind, the label ``cls``, texts ``txt`` where there is one, the rest
    ``json``."""
    values: dict[str, bytes | str] = {}
    rest: dict[str, Any] = {}
    for name, value in row.items():
        low = str(name).lower()
        if isinstance(value, Mapping) and isinstance(value.get("bytes"), bytes):
            value, path = value["bytes"], value.get("path")
            values[_member(values, _kind_of(value, path or low), low)] = value
        elif isinstance(value, (bytes, bytearray)):
            values[_member(values, _kind_of(bytes(value), low), low)] = bytes(value)
        elif low in _LABEL_COLUMNS and isinstance(value, int) and "cls" not in values:
            values["cls"] = str(value).encode()
        elif low in ("text", "caption", "txt") and isinstance(value, str) and "txt" not in values:
            values["txt"] = value.encode()
        elif value is not None:
            rest[str(name)] = value
    if rest or not values:
        values["json"] = json.dumps(rest, ensure_ascii=False, default=_plain).encode()
    return f"{number:09d}", values


def _member(values: Mapping[str, Any], extension: str, column: str) -> str:
    return extension if extension not in values else f"{safe_key(column).replace('/', '_')}.{extension}"


def _kind_of(data: bytes, name: str) -> str:
    for magic, extension in _MAGIC:
        if data.startswith(magic):
            return extension
    if data[:4] == b"RIFF":
        return "webp" if data[8:12] == b"WEBP" else "wav"
    extension = name.rpartition(".")[2].lower()
    return extension if "." in name and extension.isalnum() else "bin"


def _plain(value: Any) -> Any:
    """For JSON: numpy's numbers and arrays, dates, bytes."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, (bytes, bytearray)):
        return value.decode("utf-8", "backslashreplace")
    return str(value)
