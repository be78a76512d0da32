"""The command in this process, as a person runs it."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest

from s3loader.cli.main import main


class Command:
    """Runs ``s3loader ...`` and checks what holds for every command: its exit code, two-line errors, no traceback."""

    def __init__(self, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self._capfd = capfd
        self._monkeypatch = monkeypatch
        self.err = ""

    def __call__(self, *arguments: object, code: int = 0) -> str:
        """Its stdout; stderr is in `err`."""
        self._monkeypatch.setattr(sys, "argv", ["s3loader", *map(str, arguments)])
        self._capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        out, self.err = self._capfd.readouterr()
        assert ended.value.code == code, (ended.value.code, out, self.err)
        assert "Traceback" not in self.err
        if code not in (0, 2, 130, 141):
            error, hint = self.err.splitlines()[-2:]
            assert error.startswith("error: ")
            assert hint.startswith("hint: ")
        return out

    def json(self, *arguments: object, code: int = 0) -> Any:
        """What it prints with ``--json``."""
        return json.loads(self(*arguments, "--json", code=code))


@pytest.fixture
def command(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    return Command(capfd, monkeypatch)
