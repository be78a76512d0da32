"""ListObjectsV2 without botocore's model of it: one pass over the page's XML.

botocore's parser, and dateutil below it, cost some 70 us per key. Its client has an event before it
parses an answer: there we take the entries out, and leave it an empty body. All else (signing, regions,
errors, errors with status 200) stays botocore's. Where the event or the XML is not as expected, botocore
parses the page as ever.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any, Final
from urllib.parse import unquote_plus
from xml.etree import ElementTree

from s3loader.store.boto3.shapes import listed
from s3loader.store.listing import key_bytes
from s3loader.store.s3reads import bare_etag
from s3loader.types import CommonPrefix, ObjectMeta

__all__ = ["entries_of", "parse_page", "read_pages_ourselves"]

_ENTRIES: Final = "S3LoaderEntries"


def read_pages_ourselves(client: Any) -> None:
    """Have `client`, a boto3 client of our own, hand its listings to `parse_page`."""
    # The wildcard puts it in front of botocore's own handlers, of which one would parse the page once more
    # to look for an error with status 200.
    client.meta.events.register_first("before-parse.*.ListObjectsV2", _take)


def entries_of(page: Mapping[str, Any]) -> list[ObjectMeta | CommonPrefix]:
    """The entries of a page of any client, in order of the UTF-8 bytes of their keys."""
    entries: list[ObjectMeta | CommonPrefix] | None = page.get(_ENTRIES)
    if entries is None:
        entries = [listed(entry) for entry in page.get("Contents") or ()]
        entries += [CommonPrefix(entry["Prefix"]) for entry in page.get("CommonPrefixes") or ()]
    entries.sort(key=lambda entry: key_bytes(entry.key))
    return entries


def _take(response_dict: dict[str, Any], customized_response_dict: dict[str, Any], **_: Any) -> None:
    if response_dict["status_code"] != 200:
        return
    try:
        page = parse_page(response_dict["body"])
    except (ElementTree.ParseError, ValueError):
        return  # botocore says what is wrong with it
    customized_response_dict.update(page)
    response_dict["body"] = b""


def parse_page(body: bytes) -> dict[str, Any]:
    """A ListBucketResult, with the names of boto3's answer, and its entries as ours.

    Keys sent with ``encoding-type=url`` (which botocore always asks for) are decoded.

    Raises:
        ElementTree.ParseError: it is no XML.
        ValueError: it lacks something, or is no such document.
    """
    parser = ElementTree.XMLParser(encoding="utf-8")  # noqa: S314 - expat bounds entities itself; botocore parses with it too
    root = ElementTree.XML(body, parser)
    space, brace, name = root.tag.rpartition("}")
    if name != "ListBucketResult":
        raise ValueError("not a listing")
    space += brace  # servers disagree on it
    decoded = unquote_plus if root.findtext(space + "EncodingType") == "url" else str
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
    page = {_ENTRIES: entries, "IsTruncated": (root.findtext(space + "IsTruncated") or "").lower() == "true"}
    token = root.findtext(space + "NextContinuationToken")
    return {**page, "NextContinuationToken": token} if token else page


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
    return ObjectMeta(key, int(size), bare_etag(etag), _seconds(modified) if modified is not None else None)


def _seconds(text: str) -> float:
    if text.endswith("Z"):
        try:
            return datetime.fromisoformat(text).timestamp()
        except ValueError:
            pass  # a form that only botocore knows
    from botocore.utils import parse_timestamp

    return float(parse_timestamp(text).timestamp())
