"""The command as a person runs it: exit codes, two-line errors, JSON on stdout."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from s3loader import errors
from s3loader.cli.main import exit_code


def run(*arguments: str, env: dict[str, str] | None = None, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "s3loader", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **(env or {})}, cwd=cwd, timeout=600)


def test_help_lists_the_commands() -> None:
    result = run("--help")
    assert result.returncode == 0
    assert {"ckpt", "config", "doctor"} <= set(result.stdout.split())


def test_usage_errors_exit_2() -> None:
    assert run("no-such-command").returncode == 2
    assert run("doctor").returncode == 2


def test_an_error_is_two_lines_and_a_code() -> None:
    result = run("doctor", "ftp://host/x")
    assert result.returncode == 3
    assert [line.split(":")[0] for line in result.stderr.splitlines()] == ["error", "hint"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(shell: str) -> None:
    script = run("completion", shell)
    assert script.returncode == 0
    assert f"_S3LOADER_COMPLETE={shell}_complete" in script.stdout
    if syntax := shutil.which(shell):
        subprocess.run([syntax, "-n"], input=script.stdout, text=True, check=True)
    for words, at, wanted in (
        ("s3loader ck", 1, "ckpt"),
        ("s3loader ckpt l", 2, "ls"),
        ("s3loader get --end", 2, "--endpoints"),
    ):
        env = {"_S3LOADER_COMPLETE": f"{shell}_complete", "COMP_WORDS": words, "COMP_CWORD": str(at)}
        if shell == "fish":
            env["COMP_CWORD"] = words.split()[-1]
        assert wanted in run(env=env).stdout.replace(",", "\n").split()


def test_doctor_on_a_folder(tmp_path: Path) -> None:
    result = run("doctor", str(tmp_path), "--json")
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["engine"] == "file"
    assert found["capabilities"]["create"] is True
    assert found["capabilities"]["update"] is True
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith(".s3loader")] == []
    assert "file://" in run("doctor", str(tmp_path)).stdout


def test_doctor_does_not_make_a_mistyped_folder(tmp_path: Path) -> None:
    result = run("doctor", str(tmp_path / "typo"))
    assert result.returncode == 4
    assert not (tmp_path / "typo").exists()


def test_config_show_masks_secrets_and_names_origins(tmp_path: Path) -> None:
    env = {"S3_AWS_ACCESS_KEY_ID": "AKIDEXAMPLE00000001", "S3_AWS_SECRET_ACCESS_KEY": "hush-hush", "S3_REGION": "eu-north-1"}
    for arguments in (("config", "show"), ("config", "show", "--json")):
        result = run(*arguments, env=env, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        assert "eu-north-1" in result.stdout
        assert "env S3_REGION" in result.stdout
        assert "hush-hush" not in result.stdout


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.ConfigError("x"), 3),
        (errors.AuthenticationError("x"), 3),
        (errors.ObjectNotFoundError("x"), 4),
        (errors.CheckpointNotFoundError("x"), 4),
        (errors.ThrottledError("x"), 5),
        (errors.IntegrityError("x"), 6),
        (errors.FencedError("x"), 1),
    ],
)
def test_exit_codes(error: Exception, code: int) -> None:
    assert exit_code(error) == code
