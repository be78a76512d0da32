"""An entry whose upload is still under way."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import CancelledError, Future
from typing import Any

from s3loader.exchange.errors import WriterStateError

__all__ = ["PendingEntry"]


class PendingEntry(dict[str, Any]):
    """A manifest entry, complete for whoever looks at it: looking waits for the upload.

    So that a writer that doesn't look at its entries uploads in parallel, and one that does gets exact
    ETags. If the upload failed, looking raises its error.
    """

    def __init__(self, future: Future[dict[str, Any]]) -> None:
        super().__init__()
        self._future: Future[dict[str, Any]] | None = future

    def _wait(self) -> dict[str, Any]:
        future = self._future
        if future is not None:
            try:
                super().update(future.result())
            except CancelledError:
                raise WriterStateError(
                    "the upload was dropped: its writer was left by an exception", hint="write it again with a new writer"
                ) from None
            self._future = None
        return self

    def __getitem__(self, key: str) -> Any:
        self._wait()
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self._wait()
        return super().__contains__(key)

    def __iter__(self) -> Iterator[str]:
        self._wait()
        return super().__iter__()

    def __len__(self) -> int:
        self._wait()
        return super().__len__()

    def __eq__(self, other: object) -> bool:
        self._wait()
        return super().__eq__(other)

    __hash__ = None

    def __repr__(self) -> str:
        self._wait()
        return super().__repr__()

    def get(self, key: str, default: Any = None) -> Any:
        """See `dict.get`."""
        self._wait()
        return super().get(key, default)

    def keys(self) -> Any:
        """See `dict.keys`."""
        self._wait()
        return super().keys()

    def values(self) -> Any:
        """See `dict.values`."""
        self._wait()
        return super().values()

    def items(self) -> Any:
        """See `dict.items`."""
        self._wait()
        return super().items()

    def copy(self) -> dict[str, Any]:
        """See `dict.copy`."""
        return {**self._wait()}

    def __or__(self, other: Any) -> Any:
        return self.copy() | other

    def __ror__(self, other: Any) -> Any:
        return other | self.copy()

    def __reduce__(self) -> Any:
        return dict, (self.copy(),)
