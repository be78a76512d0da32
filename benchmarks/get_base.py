"""What all clients of `get.py` share: the workload, and threads that work through it."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from typing import Any

from _child import in_threads, resident

Check = Callable[[int, Any], None] | None
Moved = dict[str, Any]


class Client:
    """What all share: the workload, and the keys and ranges it consists of."""

    modules: tuple[str, ...] = ()
    """Imported before memory is counted: what a client is made of is not what it uses."""

    def __init__(self, spec: dict[str, Any]) -> None:
        for name in self.modules:
            importlib.import_module(name)
        spec["base"] = resident()
        self.spec = spec
        self.variant: str = spec["variant"]
        self.bucket: str = spec["bucket"]
        self.endpoint: str = spec["endpoint"]
        self.count: int = spec["count"]
        self.size: int = spec["size"]
        self.connections: int = spec["connections"]
        self.single: bool = spec["single"]
        self.ca: str | None = spec["ca"]
        self.keys: list[str] = [spec["key"]] if self.single else [spec["key"] % i for i in range(self.count)]
        self.payload = os.urandom(self.size) if spec["write"] else b""
        self.connect()

    def connect(self) -> None: ...

    def key(self, i: int) -> str:
        return self.keys[0] if self.single else self.keys[i]

    def read(self, deadline: float, check: Check) -> Moved:
        def one(i: int) -> int:
            data = self.get_range(self.key(i), i * self.size, self.size) if self.single else self.get(self.keys[i])
            if check:
                check(i, data)
            return len(data)

        return in_threads(self.connections, self.count, deadline, one)

    def write(self, deadline: float) -> Moved:
        if self.variant == "multipart":
            self.multipart()
            return {"bytes": self.count * self.size, "items": self.count}

        def one(i: int) -> int:
            self.put(self.keys[i])
            return self.size

        return in_threads(self.connections, self.count, deadline, one)

    def get(self, key: str) -> Any:
        raise NotImplementedError

    def get_range(self, key: str, start: int, length: int) -> Any:
        raise NotImplementedError

    def put(self, key: str) -> None:
        raise NotImplementedError

    def multipart(self) -> None:
        raise NotImplementedError
