"""The object layer: `open_store` and `ObjectStore`; for stores of one's own `Backend`, and what stands around one."""

from s3loader.store.backend import Backend, ForwardingBackend
from s3loader.store.local.backend import LocalBackend
from s3loader.store.memory import MemoryBackend
from s3loader.store.objectstore import ObjectStore
from s3loader.store.open import open_store
from s3loader.store.options import StoreOptions
from s3loader.store.pipeline import Pipeline
from s3loader.store.retry import RateLimit, RetryPolicy

__all__ = [
    "Backend",
    "ForwardingBackend",
    "LocalBackend",
    "MemoryBackend",
    "ObjectStore",
    "Pipeline",
    "RateLimit",
    "RetryPolicy",
    "StoreOptions",
    "open_store",
]
