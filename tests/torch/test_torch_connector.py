"""s3torchconnector's client configuration: every entry either works or says that it does not."""

import warnings
from dataclasses import dataclass

import pytest

from s3loader.store import StoreOptions
from s3loader.testing import FaultProxy, server
from s3loader.torch import S3IterableDataset, S3MapDataset


@dataclass
class Config:
    """With the names and defaults of s3torchconnector's `S3ClientConfig`."""

    throughput_target_gbps: float = 10.0
    part_size: int = 8 << 20
    unsigned: bool = False
    force_path_style: bool = False
    max_attempts: int = 10
    profile: str | None = None
    requester_pays: bool = False


@pytest.mark.parametrize("store_options", [{}, {"store_options": StoreOptions(max_attempts=2)}])
def test_requester_pays_reaches_the_store(store_options):
    with server("moto") as s3:
        store = s3.open_store(s3.bucket("payer"))
        store.put("a/1", b"x")
        settings = s3.settings
        with FaultProxy(s3.endpoint_url) as proxy:
            dataset = S3IterableDataset.from_prefix(
                "s3://payer/a/",
                endpoint=proxy.endpoint_url,
                settings=settings,
                s3client_config=Config(requester_pays=True, force_path_style=True),
                **store_options,
            )
            assert [reader.read() for reader in dataset] == [b"x"]
            assert {seen.headers.get("x-amz-request-payer") for seen in proxy.requests} == {"requester"}
            dataset.source.store.close()
        store.close()


@pytest.mark.parametrize("cls", [S3IterableDataset, S3MapDataset])
def test_what_has_no_meaning_here_is_said(cls, numbers_url):
    with pytest.warns(UserWarning, match="part_size=1 has no meaning here: ranges"):
        cls.from_prefix(numbers_url, s3client_config=Config(part_size=1))
    with pytest.warns(UserWarning, match=r"throughput_target_gbps=100\.0 has no meaning here: concurrency="):
        cls.from_prefix(numbers_url, s3client_config=Config(throughput_target_gbps=100.0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cls.from_prefix(numbers_url, s3client_config=Config())
