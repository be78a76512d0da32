"""ListObjectsV2 without botocore's model of it: one pass over the page's XML.

botocore's parser, and dateutil below it, cost some 70 us per key. Its client has an event before it
parses an answer: there we take the entries out, and leave it an empty body. All else (signing, regions,
errors, errors with status 200) stays botocore's. Where the event or the XML is not as expected, botocore
parses the page as ever.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final
from xml.etree import ElementTree

from s3loader.store.boto3.shapes import listed
from s3loader.store.listing import key_bytes
from s3loader.store.s3.xml import read_page
from s3loader.types import CommonPrefix, ObjectMeta

__all__ = ["entries_of", "read_pages_ourselves"]

_ENTRIES: Final = "S3LoaderEntries"


def read_pages_ourselves(client: Any) -> None:
    """Have `client`, a boto3 client of our own, hand its listings to `s3.xml.read_page`."""
    # The wildcard puts it in front of botocore's own handlers, of which one would parse the page once more
    # to look for an error with status 200.
    client.meta.events.register_first("before-parse.*.ListObjectsV2", _take)


def entries_of(page: Mapping[str, Any]) -> list[ObjectMeta | CommonPrefix]:
    """The entries of a page of any client, in order of the UTF-8 bytes of their keys."""
    entries: list[ObjectMeta | CommonPrefix] | None = page.get(_ENTRIES)
    if entries is not None:
        return entries
    entries = [listed(entry) for entry in page.get("Contents") or ()]
    entries += [CommonPrefix(entry["Prefix"]) for entry in page.get("CommonPrefixes") or ()]
    entries.sort(key=lambda entry: key_bytes(entry.key))
    return entries


def _take(response_dict: dict[str, Any], customized_response_dict: dict[str, Any], **_: Any) -> None:
    if response_dict["status_code"] != 200:
        return
    try:
        parser = ElementTree.XMLParser(encoding="utf-8")  # noqa: S314 - expat bounds entities itself; botocore parses with it too
        root = ElementTree.XML(response_dict["body"], parser)
        if root.tag.rpartition("}")[2] != "ListBucketResult":
            return
        page = read_page(root)
    except (ElementTree.ParseError, ValueError):
        return  # botocore says what is wrong with it
    customized_response_dict.update({_ENTRIES: page.entries, "IsTruncated": page.truncated})
    if page.after:
        customized_response_dict["NextContinuationToken"] = page.after["continuation-token"]
    response_dict["body"] = b""
