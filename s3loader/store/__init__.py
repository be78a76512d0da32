"""The object layer."""

from s3loader.store.objectstore import ObjectStore
from s3loader.store.open import open_store
from s3loader.store.options import StoreOptions

__all__ = ["ObjectStore", "StoreOptions", "open_store"]
