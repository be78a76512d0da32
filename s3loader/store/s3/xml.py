"""The XML documents of S3: requests written, responses read. Pure."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime
from typing import Final, Generic, NamedTuple, TypeAlias, TypeVar
from urllib.parse import unquote_plus
from xml.etree import ElementTree as ET

from s3loader.store.arguments import bare_etag
from s3loader.store.backend import key_bytes
from s3loader.types import CommonPrefix, ObjectMeta, PartResult

__all__ = [
    "Page",
    "complete_document",
    "delete_document",
    "is_xml_text",
    "read_delete_failures",
    "read_page",
    "read_parts",
    "read_tags",
    "read_uploads",
    "text_of",
]

_NAMESPACE: Final = "http://s3.amazonaws.com/doc/2006-03-01/"
# what an XML 1.0 document cannot hold (or, as a carriage return, keep)
_NOT_XML: Final = re.compile("[^\t\n\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
Element: TypeAlias = ET.Element
T = TypeVar("T")


class Page(NamedTuple, Generic[T]):
    """One page of a listing."""

    entries: list[T]
    after: dict[str, str | int]
    """The parameters of the query of the next page; empty where the page does not say."""
    truncated: bool
    """Whether there is a next page."""


def is_xml_text(key: str) -> bool:
    """Whether a document can name `key`: XML has no way to write most control characters."""
    return _NOT_XML.search(key) is None


def text_of(root: Element, name: str) -> str:
    """The text of the first child of that name, whatever its namespace; "" where there is none."""
    found = next((child for child in root if _bare(child.tag) == name), None)
    return "" if found is None else found.text or ""


def read_tags(root: Element) -> dict[str, str]:
    """A Tagging document."""
    return {
        text_of(tag, "Key"): text_of(tag, "Value")
        for tags in root
        if _bare(tags.tag) == "TagSet"
        for tag in tags
        if _bare(tag.tag) == "Tag"
    }


def read_page(root: Element) -> Page[ObjectMeta | CommonPrefix]:
    """A ListBucketResult (version 2), its entries in order of the UTF-8 bytes of their keys, which are decoded if they came
    URL-encoded.

    Raises:
        ValueError: it lacks something.
    """
    space = root.tag.rpartition("}")[0]
    space += "}" if space else ""  # servers disagree on it
    decoded = _decoder(root)
    entries: list[ObjectMeta | CommonPrefix] = []
    contents, prefixes = space + "Contents", space + "CommonPrefixes"
    names = [space + name for name in ("Key", "Size", "ETag", "LastModified")]
    for child in root:
        if child.tag == contents:
            entries.append(_listed(decoded, *map(child.findtext, names)))
        elif child.tag == prefixes:
            entries += [CommonPrefix(decoded(found.text or "")) for found in child.iter(space + "Prefix")]
        elif not child.tag.startswith(space):
            raise ValueError("a listing in several namespaces")
    entries.sort(key=lambda entry: key_bytes(entry.key))
    truncated = (root.findtext(space + "IsTruncated") or "").lower() == "true"
    token = root.findtext(space + "NextContinuationToken")
    return Page(entries, {"continuation-token": token} if token else {}, truncated)


def _decoder(root: Element) -> Callable[[str], str]:
    return unquote_plus if text_of(root, "EncodingType") == "url" else str


def _listed(
    decoded: Callable[[str], str],
    key: str | None = None,
    size: str | None = None,
    etag: str | None = None,
    modified: str | None = None,
) -> ObjectMeta:
    if key is None or size is None:
        raise ValueError("an entry without a key or a size")
    if "%" in key or "+" in key:  # most have neither
        key = decoded(key)
    return ObjectMeta(key, _count(size), bare_etag(etag), _seconds(modified) if modified else None)


def _count(text: str) -> int:
    if not text.strip().isdecimal() or len(text) > 20:
        raise ValueError("a size that is no number")
    return int(text)


def _seconds(text: str) -> float:
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:
        from botocore.utils import parse_timestamp  # a form that only botocore knows

        return float(parse_timestamp(text).timestamp())


def read_uploads(root: Element) -> Page[tuple[str, str, float | None]]:
    """A ListMultipartUploadsResult: ``(key, upload id, begun in seconds since the epoch)`` of each.

    Raises:
        ValueError: it lacks something.
    """
    decoded = _decoder(root)
    uploads = []
    for child in _children(root, "Upload"):
        key, upload_id, begun = text_of(child, "Key"), text_of(child, "UploadId"), text_of(child, "Initiated")
        if not key or not upload_id:
            raise ValueError("an upload without a key or an id")
        uploads.append((decoded(key), upload_id, _seconds(begun) if begun else None))
    after = {"key-marker": decoded(text_of(root, "NextKeyMarker")), "upload-id-marker": text_of(root, "NextUploadIdMarker")}
    return Page(uploads, {name: value for name, value in after.items() if value}, _is_truncated(root))


def read_parts(root: Element) -> Page[PartResult]:
    """A ListPartsResult.

    Raises:
        ValueError: it lacks something.
    """
    parts = [
        PartResult(
            _count(text_of(child, "PartNumber")),
            bare_etag(text_of(child, "ETag")),
            _count(text_of(child, "Size")),
            text_of(child, "ChecksumCRC32C") or None,
        )
        for child in _children(root, "Part")
    ]
    marker = text_of(root, "NextPartNumberMarker")
    return Page(parts, {"part-number-marker": marker} if marker else {}, _is_truncated(root))


def read_delete_failures(root: Element) -> Iterator[tuple[str, str, str]]:
    """``(key, code, message)`` of each key that a DeleteResult says was not deleted."""
    for child in _children(root, "Error"):
        yield text_of(child, "Key"), text_of(child, "Code"), text_of(child, "Message")


def delete_document(keys: Iterable[str]) -> bytes:
    """A Delete request for `keys`, which `is_xml_text` has passed; only failures are to be reported."""
    root = ET.Element("Delete", xmlns=_NAMESPACE)
    ET.SubElement(root, "Quiet").text = "true"
    for key in keys:
        ET.SubElement(ET.SubElement(root, "Object"), "Key").text = key
    return bytes(ET.tostring(root, "utf-8"))


def complete_document(parts: Sequence[PartResult]) -> bytes:
    """A CompleteMultipartUpload request."""
    root = ET.Element("CompleteMultipartUpload", xmlns=_NAMESPACE)
    for part in parts:
        entry = ET.SubElement(root, "Part")
        ET.SubElement(entry, "PartNumber").text = str(part.number)
        ET.SubElement(entry, "ETag").text = f'"{part.etag}"'
        if part.checksum:
            ET.SubElement(entry, "ChecksumCRC32C").text = part.checksum
    return bytes(ET.tostring(root, "utf-8"))


def _children(root: Element, name: str) -> list[Element]:
    return [child for child in root if _bare(child.tag) == name]


def _is_truncated(root: Element) -> bool:
    return text_of(root, "IsTruncated").lower() == "true"


def _bare(tag: str) -> str:
    return tag.rpartition("}")[2]
