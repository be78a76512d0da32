"""``--anonymous`` before the command holds for every command that opens a store."""

from __future__ import annotations

import os
import subprocess
import sys

from s3loader.testing import server


def test_anonymous_requests_are_sent_without_credentials_by_every_command() -> None:
    with server("moto") as s3:
        bucket = s3.bucket()
        settings = {
            "AWS_ENDPOINT_URL": s3.endpoint_url,
            "AWS_REGION": s3.region,
            "AWS_ACCESS_KEY_ID": s3.access_key_id,
            "AWS_SECRET_ACCESS_KEY": s3.secret_access_key,
        }

        def run(*words: str) -> str:
            command = [sys.executable, "-m", "s3loader", *words]
            done = subprocess.run(command, env={**os.environ, **settings}, capture_output=True, text=True)
            return f"{done.returncode} {done.stderr}"

        assert run("doctor", f"s3://{bucket}").startswith("0")
        assert "access denied" in run("--anonymous", "doctor", f"s3://{bucket}")
