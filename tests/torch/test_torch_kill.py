"""SIGKILL: of the whole job and of one worker. What was delivered and saved before, and what comes after, is one sequence."""

import json
import subprocess
import sys
import textwrap

import pytest
from torch_helpers import numbered

from s3loader.loader import Loader, from_manifest

SAMPLES = 240

JOB = textwrap.dedent(
    """
    import json, os, signal, sys
    import torch
    from s3loader.torch import S3DataLoader

    url, log, workers, batch, kill = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5]

    def number(sample):
        return int(bytes(sample[:6].numpy()))

    def transform(sample):
        if kill == "worker" and number(sample) == 150:
            os.kill(os.getpid(), signal.SIGKILL)
        return sample

    def train():
        loader = S3DataLoader(url, batch_size=batch, num_workers=workers, transform=transform)
        lines = open(log).read().splitlines() if os.path.exists(log) else []
        if lines:
            loader.load_state_dict(json.loads(lines[-1])["state"])
        with open(log, "a") as file:
            for step, samples in enumerate(loader):
                file.write(json.dumps({"ids": [number(s) for s in samples], "state": loader.state_dict()}) + "\\n")
                file.flush()
                if kill == "job" and step == 12:
                    os.kill(os.getpid(), signal.SIGKILL)

    if __name__ == "__main__":
        train()
    """
)


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    return numbered(tmp_path_factory.mktemp("kill"), SAMPLES)


@pytest.mark.parametrize(("kill", "code"), [("job", -9), ("worker", 1)])
def test_kill_and_resume_with_other_workers_and_batch_size(url, tmp_path, kill, code):
    script, log = tmp_path / "job.py", tmp_path / "log.jsonl"
    script.write_text(JOB)

    def job(*args):
        return subprocess.run(
            [sys.executable, script, url, log, *args], capture_output=True, text=True, timeout=120, check=False
        )

    first = job("2", "8", kill)
    assert first.returncode == code, first.stderr
    if kill == "worker":
        assert "worker" in first.stderr.splitlines()[-1] or "WorkerError" in first.stderr
    before = len(log.read_text().splitlines())
    assert before >= (13 if kill == "job" else 1)
    second = job("1", "5", "no")
    assert second.returncode == 0, second.stderr
    ids = [i for line in log.read_text().splitlines() for i in json.loads(line)["ids"]]
    assert ids == [int(bytes(s[:6])) for batch in Loader(from_manifest(url), batch_size=8) for s in batch]
