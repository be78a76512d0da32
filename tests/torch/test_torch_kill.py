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
            [sys.executable, script, url, log, *args], capture_output=True, text=True, timeout=600, check=False
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


ORPHANS = textwrap.dedent(
    """
    import os, signal, sys
    from torch.utils.data import DataLoader
    from s3loader.torch import S3DataLoader, S3IterableDataset, S3MapDataset

    url, kind = sys.argv[1:]

    def pad(sample):
        return bytes(20_000)

    def whole(samples):
        return samples

    options = {"num_workers": 2, "prefetch_factor": 8}
    if kind == "S3DataLoader":
        loader = S3DataLoader(url, batch_size=8, transform=pad, collate=None, **options)
    elif kind == "S3IterableDataset":
        loader = DataLoader(S3IterableDataset(url, batch_size=8, transform=pad, collate=None), batch_size=None, **options)
    else:
        loader = DataLoader(S3MapDataset(url, transform=pad), batch_size=8, collate_fn=whole, **options)
    for batch in loader:
        os.kill(os.getpid(), signal.SIGKILL)
    """
)


@pytest.mark.parametrize("kind", ["S3DataLoader", "S3IterableDataset", "S3MapDataset"])
def test_workers_of_a_killed_job_end_though_their_pipes_are_full(url, tmp_path, kind):
    script = tmp_path / "orphans.py"
    script.write_text(ORPHANS)
    # Workers hold the pipe that is read here to its end: while one of them lives, this waits.
    done = subprocess.run([sys.executable, script, url, kind], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == -9, done.stderr
