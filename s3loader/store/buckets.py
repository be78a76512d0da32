"""Buckets themselves: made, deleted, listed. Rare requests, so botocore makes those to S3."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from functools import partial
from typing import Any, Final, Unpack

from s3loader import events
from s3loader.errors import ObjectExistsError, ObjectNotFoundError, S3LoaderError, UnsupportedOperationError
from s3loader.store import memory
from s3loader.store.boto3.watch import Watch
from s3loader.store.client_errors import from_botocore
from s3loader.store.local import files
from s3loader.store.open import StoreKeywords, settings_of
from s3loader.store.s3errors import Where
from s3loader.types import Location, ObjectURL

__all__ = ["create_bucket", "delete_bucket", "list_buckets"]

_ELSEWHERE: Final = {
    "gs": "make, list and delete them with `gcloud storage buckets`",
    "az": "make, list and delete them with `az storage container`",
}
_OTHER_REGION: Final = ("IllegalLocationConstraintException", "InvalidLocationConstraint")
_MINE: Final = ("BucketAlreadyOwnedByYou",)


def create_bucket(url: Location, *, exist_ok: bool = True, **place: Unpack[StoreKeywords]) -> bool:
    """Make the bucket of `url` (its key is not looked at), or the folder; whether it is new.

    Args:
        exist_ok: A bucket of yours that is there already is no error.
        place: Where and who: ``endpoint_url``, ``region``, ``profile`` and the other keywords of `open_store`.

    Raises:
        ObjectExistsError: it is there, and not `exist_ok`, or belongs to somebody else.
        UnsupportedOperationError: ``gs://`` and ``az://``.
    """
    where = _bucket_of(url, "create bucket")
    if where.scheme == "memory":
        made = memory.create_bucket(where.bucket)
    elif where.scheme == "file":
        made = not os.path.isdir(where.key)
        with files.Guard("create bucket", str(where), os.fsencode(where.key)):
            files.make_parents(os.fsencode(where.key))
    else:
        made = _create_on_s3(where, place)
    if not made and not exist_ok:
        raise ObjectExistsError(
            "the bucket is there already", op="create bucket", url=str(where), hint="use it, or another name"
        )
    return made


def delete_bucket(url: Location, **place: Unpack[StoreKeywords]) -> None:
    """Delete the bucket of `url`, or the folder; it must be empty.

    Raises:
        BucketNotFoundError: there is none.
        ConflictError: there are objects in it; nothing was deleted.
        UnsupportedOperationError: ``gs://`` and ``az://``.
    """
    where = _bucket_of(url, "delete bucket")
    if where.scheme == "memory":
        memory.delete_bucket(where.bucket)
    elif where.scheme == "file":
        with files.Guard("delete bucket", str(where), os.fsencode(where.key)):
            try:
                os.rmdir(where.key)
            except OSError as error:
                if os.path.isdir(where.key) and os.listdir(where.key):
                    raise memory.not_empty(str(where)) from error
                raise
    else:
        try:
            _ask(where, place, "delete bucket", "DELETE", lambda client: client.delete_bucket(Bucket=where.bucket))
        except S3LoaderError as error:
            if error.code == "BucketNotEmpty":
                raise memory.not_empty(str(where)) from error
            raise


def list_buckets(url: Location = "s3://", **place: Unpack[StoreKeywords]) -> list[str]:
    """URLs of the buckets that the credentials own, sorted; of a folder, its folders.

    Args:
        url: ``"s3://"``, ``"memory://"``, or a folder; a bucket or key in it is not looked at.

    Raises:
        UnsupportedOperationError: ``gs://`` and ``az://``.
    """
    if isinstance(url, str) and url.endswith("://") and url != "file://":
        where = ObjectURL(url[:-3].lower(), "", "")
    else:
        where = ObjectURL.parse(url)
    if where.scheme == "memory":
        return [f"memory://{name}" for name in memory.list_buckets()]
    if where.scheme == "file":
        with files.Guard("list buckets", str(where), os.fsencode(where.key)), os.scandir(where.key) as entries:
            names = [entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(".")]
        return sorted(str(where.joined(name)) for name in names)
    _check_scheme(where, "list buckets")
    where = ObjectURL("s3", "", "")
    found: list[str] = []
    token = ""
    while True:
        more: dict[str, str] = {"ContinuationToken": token} if token else {}
        answer = _ask(where, place, "list buckets", "LIST", partial(_list_page, more))
        found += [f"s3://{bucket['Name']}" for bucket in answer.get("Buckets") or ()]
        token = answer.get("ContinuationToken") or ""
        if not token:
            return sorted(found)


def _bucket_of(url: Location, op: str) -> ObjectURL:
    """The bucket alone. A bare name is one of S3, as the command line takes it."""
    if isinstance(url, str) and url and "://" not in url and not url.startswith(("/", ".", "~")):
        url = f"s3://{url}"
    where = ObjectURL.parse(url)
    _check_scheme(where, op)
    return where if where.scheme == "file" else ObjectURL(where.scheme, where.bucket, "")


def _check_scheme(where: ObjectURL, op: str) -> None:
    if where.scheme in _ELSEWHERE:
        raise UnsupportedOperationError(
            f"s3loader cannot manage the buckets of {where.scheme}://", op=op, url=str(where), hint=_ELSEWHERE[where.scheme]
        )


def _create_on_s3(where: ObjectURL, place: StoreKeywords) -> bool:
    def run(client: Any) -> Any:
        region = client.meta.region_name
        plain = region in (None, "us-east-1", "aws-global")
        extra = {} if plain else {"CreateBucketConfiguration": {"LocationConstraint": region}}
        return client.create_bucket(Bucket=where.bucket, **extra)

    if _is_there(where, place):
        return False  # in us-east-1 the request itself would succeed
    try:
        _ask(where, place, "create bucket", "PUT", run)
    except S3LoaderError as error:
        if error.code in _MINE:
            return False
        if error.code == "BucketAlreadyExists":
            raise ObjectExistsError(
                "the bucket belongs to somebody else", op="create bucket", url=str(where), code=error.code
            ) from error
        if error.code in _OTHER_REGION:
            client: Any = place.get("s3_client")
            region = settings_of(place).region if client is None else client.meta.region_name
            error.hint = f"the endpoint is of another region than {region!r}: name its region (--region, region=)"
        raise
    return True


def _is_there(where: ObjectURL, place: StoreKeywords) -> bool:
    try:
        _ask(where, place, "look for bucket", "HEAD", lambda client: client.head_bucket(Bucket=where.bucket))
    except ObjectNotFoundError:
        return False
    return True


def _list_page(more: dict[str, str], client: Any) -> Any:
    return client.list_buckets(**more)


def _ask(where: ObjectURL, place: StoreKeywords, op: str, event: str, run: Callable[[Any], Any]) -> Any:
    """What `run` gets from a boto3 client."""
    given = place.get("s3_client")
    options = place.get("options")
    client = given or settings_of(place).create_client(anonymous=bool(options and options.unsigned))
    watch = Watch(client, Where(op, str(where)), event, str(where)) if events.active() else None
    try:
        with watch or contextlib.nullcontext():
            answer = run(client)
    except Exception as error:  # noqa: BLE001 - botocore's errors share no base with those of its sockets
        failed = from_botocore(error, Where(op, str(where)))
        if watch is not None:
            watch.end(error=failed)
        raise failed from (None if failed.status is not None else error)
    finally:
        if given is None:
            client.close()
    if watch is not None:
        watch.end(answer=answer)
    return answer
