"""`make soak`: ten minutes of training against a bad network, with processes killed at random; then the count.

Four processes work on one S3 server through the fault proxy: one loads epoch after epoch, two append to one manifest (and
compact it), one saves, restores and deletes checkpoints. A few requests in a hundred fail (`rules`), and every few seconds a
process is killed and started again; in the last third none is, so that memory and descriptors can be seen to stay flat.

Each worker writes down what it was told, one line an event, before it goes on. In the end, without the proxy:

- what was delivered, over all lives, is the plan: every batch of every epoch, in order, byte for byte;
- every append that was acknowledged is in the manifest once, and nothing that was never sent;
- no acknowledged checkpoint is missing that retention should have kept, and each is what was saved;
- no worker met an error that is none of `s3loader.errors`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from s3loader import Loader, S3ExchangeStore, ShardSizePolicy, open_dataset
from s3loader.checkpoint import CheckpointManager, LatestN
from s3loader.errors import ObjectChangedError, S3LoaderError
from s3loader.store import ObjectStore
from s3loader.testing import FaultProxy, Rule, server
from s3loader.testing.servers import Server

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "benchmarks" / "out"
SAMPLES = 600
REPEAT = 400
"""A sample is its number, so often."""
BATCH = 16
KEEP = 3
PATIENCE = 120.0
"""Seconds that are added where a slow machine has not let every worker do something."""
MANIFEST = "appended/m.jsonl"
OBJECTS = r"^/[^/?]+/[^?]+$"  # no listing: nothing tells that a name in one is wrong


def rules() -> list[Rule]:
    """About four requests in a hundred fail."""
    return [
        Rule("refuse", probability=0.006),
        Rule("drop_reply", probability=0.006),
        Rule("error", status=503, code="SlowDown", probability=0.01),
        Rule("error", status=500, forward=True, probability=0.004),
        Rule("truncate", method="GET", probability=0.005),
        Rule("reset", method="GET", probability=0.005),
        Rule("flip", method="GET", path=OBJECTS, probability=0.005),
    ]


class Diary:
    """What a worker was told: lines of JSON, each whole or not there."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def note(self, **event: Any) -> None:
        os.write(self._fd, (json.dumps(event) + "\n").encode())

    def events(self) -> list[dict[str, Any]]:
        return read_diary(self.path)


def read_diary(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    found = []
    for line in path.read_bytes().split(b"\n"):
        with contextlib.suppress(ValueError):  # the last words of one that was killed
            found.append(json.loads(line))
    return found


# workers


def worker(kind: str, folder: Path) -> None:
    setting = json.loads((folder / "setting.json").read_text())
    place = setting["bucket"] + ("/run" if kind == "save" else "")
    store = Server("ministack", setting["endpoint"]).open_store(place)
    diary = Diary(folder / f"{kind}.jsonl")
    turn = WORKERS[kind](store, diary, kind)
    while not (folder / "stop").exists():
        try:
            next(turn)
        except S3LoaderError as error:
            diary.note(error=type(error).__name__, text=str(error)[:300])
            turn = WORKERS[kind](store, diary, kind)
        except Exception:
            diary.note(crash=traceback.format_exc()[-1500:])
            raise


def load(store: ObjectStore, diary: Diary, kind: str) -> Iterator[None]:
    last = next((event for event in reversed(diary.events()) if "state" in event), None)
    loader = the_loader(store)
    if last is not None:
        loader.load_state_dict(last["state"])
    while True:
        for batch in loader:
            diary.note(ids=read_batch(batch), epoch=loader.epoch, state=loader.state_dict())
            yield


def the_loader(store: ObjectStore) -> Loader:
    return Loader(open_dataset("data/m.jsonl", store=store), batch_size=BATCH, seed=11)


def read_batch(batch: Any) -> list[int]:
    ids = []
    for sample in batch:
        one = bytes(sample[:4])
        assert bytes(sample) == one * REPEAT, "a sample that was never written"
        ids.append(int.from_bytes(one, "big"))
    return ids


def append(store: ObjectStore, diary: Diary, kind: str) -> Iterator[None]:
    exchange = S3ExchangeStore(store)
    number = max((event["sent"] for event in diary.events() if "sent" in event), default=-1) + 1
    while True:
        diary.note(sent=number)
        key = f"{kind}/{number}"
        exchange.write_manifest(MANIFEST, [{"kind": "file", "key": key}], mode="append_parts")  # type: ignore[list-item]
        diary.note(done=number)
        number += 1
        if kind == "append0" and number % 50 == 0:
            with contextlib.suppress(ObjectChangedError):  # the other one appended meanwhile
                exchange.compact_manifest(MANIFEST, MANIFEST, apply_deletes=False)
        yield


def state_of(step: int) -> dict[str, Any]:
    return {"w": np.random.default_rng(step).integers(0, 1 << 30, 20_000), "step": step}


def is_state(found: Any, step: int) -> bool:
    return found["step"] == step and bool((found["w"] == state_of(step)["w"]).all())


def save(store: ObjectStore, diary: Diary, kind: str) -> Iterator[None]:
    done = [event["saved"] for event in diary.events() if "saved" in event]
    with CheckpointManager(store, keep=LatestN(KEEP)) as manager:
        yield from saving(manager, diary, done)


def saving(manager: CheckpointManager, diary: Diary, done: list[int]) -> Iterator[None]:
    latest = manager.latest()
    if done:
        assert latest is not None, "no step is there"
        assert latest >= max(done), f"step {max(done)} was acknowledged, {latest} is the newest"
        assert is_state(manager.restore(latest), latest), "a step that was never saved"
    step = max(latest or 0, *done, 0) + 1
    while True:
        manager.save(step, state_of(step)).result()
        diary.note(saved=step)
        step += 1
        if step % 10 == 0:
            manager.gc(grace=60)
        yield


WORKERS: dict[str, Callable[[ObjectStore, Diary, str], Iterator[None]]] = {
    "load": load,
    "append0": append,
    "append1": append,
    "save": save,
}


# the one that watches


@dataclass
class Life:
    """One worker, over all its lives."""

    kind: str
    folder: Path
    process: subprocess.Popen[bytes] | None = None
    kills: int = 0
    told: int = 0
    """Bytes of its diary when it was last started."""
    samples: list[tuple[int, int]] = field(default_factory=list)
    """Resident bytes and descriptors, since it first did something after it was last started."""

    def start(self) -> None:
        log = (self.folder / f"{self.kind}.log").open("ab")
        command = [sys.executable, "-m", "benchmarks.soak", "--worker", self.kind, "--folder", str(self.folder)]
        with log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, cwd=ROOT)
        self.samples = []
        self.told = self._size()

    def _size(self) -> int:
        diary = self.folder / f"{self.kind}.jsonl"
        return diary.stat().st_size if diary.exists() else 0

    @property
    def has_worked(self) -> bool:
        """Whether it has done something since it was started: on a slow machine kills must not be all that happens."""
        return self._size() > self.told

    def kill(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        self.kills += 1
        self.start()

    def look(self) -> None:
        """Note what it holds; not while it still imports."""
        assert self.process is not None
        if not self.has_worked:
            return
        place = Path(f"/proc/{self.process.pid}")
        with contextlib.suppress(OSError, IndexError, ValueError):
            resident = int((place / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
            self.samples.append((resident, len(os.listdir(place / "fd"))))


def soak(seconds: float, folder: Path, *, seed: int = 0, kill_every: float = 4.0, steady: bool = True) -> tuple[bool, str]:
    """Run it.

    Args:
        seconds: How long the workers work.
        folder: For diaries and logs.
        seed: Of faults and kills.
        kill_every: Mean seconds between two kills.
        steady: Judge memory and descriptors, which needs some minutes without kills.

    Returns:
        Whether all is well, and the verdict: a page of Markdown.
    """
    rng = random.Random(seed)
    with server("ministack") as s3, FaultProxy(s3.endpoint_url, rules(), seed=seed) as proxy:
        bucket = s3.bucket()
        direct = s3.open_store(bucket)
        fill(direct)
        (folder / "setting.json").write_text(json.dumps({"endpoint": proxy.endpoint_url, "bucket": bucket}))
        lives = [Life(kind, folder) for kind in WORKERS]
        begin = time.monotonic()
        requests = 0
        try:
            for life in lives:
                life.start()
            next_kill = begin + rng.expovariate(1 / kill_every)
            while (now := time.monotonic()) < begin + seconds or (now < begin + seconds + PATIENCE and not all_did(folder)):
                time.sleep(0.25)
                alive = [life for life in lives if life.has_worked]
                if now > next_kill and now < begin + seconds * 2 / 3 and alive:
                    rng.choice(alive).kill()
                    next_kill = now + rng.expovariate(1 / kill_every)
                for life in lives:
                    life.look()
                requests += len(proxy.requests)
                proxy.clear()
            (folder / "stop").touch()
            codes = [life.process.wait(120) for life in lives if life.process is not None]
        finally:
            for life in lives:
                if life.process is not None and life.process.poll() is None:
                    life.process.kill()
                    life.process.wait()
        fired: Counter[str] = Counter()
        for rule in proxy.plan.rules:
            fired[rule.action] += rule.fired
        checks = [
            check_delivery(direct, folder),
            check_appends(direct, folder),
            check_saves(s3.open_store(f"{bucket}/run"), folder),
            check_crashes(lives, codes),
            *([check_flat(life) for life in lives] if steady else []),
        ]
    well = all(problem == "" for _, _, problem in checks)
    rows = "\n".join(f"| {what} | {count} | {problem or 'ok'} |" for what, count, problem in checks)
    errors = Counter(
        event["error"] for life in lives for event in read_diary(folder / f"{life.kind}.jsonl") if "error" in event
    )
    kills = ", ".join(f"{life.kind} {life.kills}" for life in lives)
    faults = ", ".join(f"{name} {count}" for name, count in fired.items())
    met = ", ".join(f"{name} {count}" for name, count in errors.most_common()) or "none"
    page = f"""# Soak: {"all is well" if well else "FAILED"}

{seconds:.0f} s, {requests} requests, {fired.total()} of them struck ({faults}); killed: {kills}.
Errors that reached a worker, all of `s3loader.errors`: {met}.

| what | how many | verdict |
|---|---|---|
{rows}
"""
    return well, page


def all_did(folder: Path) -> bool:
    """Whether every worker has something to show."""
    wanted = {"load": "ids", "append0": "done", "append1": "done", "save": "saved"}
    return all(any(name in event for event in read_diary(folder / f"{kind}.jsonl")) for kind, name in wanted.items())


def fill(store: ObjectStore) -> None:
    with S3ExchangeStore(store).open_manifest_writer("data/m.jsonl", shard_size=ShardSizePolicy(max_entries=100)) as writer:
        for i in range(SAMPLES):
            writer.add_to_shard(f"{i:06d}.bin", i.to_bytes(4, "big") * REPEAT, id=str(i))


Check = tuple[str, int, str]
"""What was looked at, how much of it, and what is wrong."""


def check_delivery(store: ObjectStore, folder: Path) -> Check:
    events = [event for event in read_diary(folder / "load.jsonl") if "ids" in event]
    loader = the_loader(store)
    problem = "" if events else "nothing was delivered"
    plan: Iterator[tuple[int, list[int]]] = ((loader.epoch, read_batch(batch)) for _ in iter(int, 1) for batch in loader)
    for number, (event, (epoch, ids)) in enumerate(zip(events, plan, strict=False)):
        if (event["epoch"], event["ids"]) != (epoch, ids):
            problem = f"batch {number} is {event['epoch']}: {event['ids'][:4]}..., the plan is {epoch}: {ids[:4]}..."
            break
    return "batches delivered = plan", len(events), problem


def check_appends(store: ObjectStore, folder: Path) -> Check:
    found = Counter(entry["key"] for entry in S3ExchangeStore(store).iter_manifest_entries(MANIFEST))  # type: ignore[typeddict-item]
    done: set[str] = set()
    sent: set[str] = set()
    for kind in ("append0", "append1"):
        for event in read_diary(folder / f"{kind}.jsonl"):
            if "done" in event:
                done.add(f"{kind}/{event['done']}")
            if "sent" in event:
                sent.add(f"{kind}/{event['sent']}")
    lost, twice, strange = done - found.keys(), [key for key, n in found.items() if n > 1], found.keys() - sent
    problem = "; ".join(
        f"{len(keys)} {name}, e.g. {sorted(keys)[0]}"
        for name, keys in (("lost", lost), ("twice", twice), ("never sent", strange))
        if keys
    )
    return "acknowledged appends are there once", len(done), problem if done else "nothing was appended"


def check_saves(store: ObjectStore, folder: Path) -> Check:
    done = [event["saved"] for event in read_diary(folder / "save.jsonl") if "saved" in event]
    problems = [] if done else ["nothing was saved"]
    with CheckpointManager(store) as manager:
        steps = manager.steps()
        newest = sorted({*steps, *done})[-KEEP:]  # of a save without an answer too
        problems += [f"step {step} is lost" for step in done if step in newest and step not in steps]
        for step in steps:
            if not is_state(manager.restore(step), step):
                problems.append(f"step {step} is not what was saved")
    return f"acknowledged checkpoints, the last {KEEP} restored", len(done), "; ".join(problems)


def check_crashes(lives: list[Life], codes: list[int]) -> Check:
    crashes = [
        f"{life.kind}: {event['crash'].splitlines()[-1]}"
        for life in lives
        for event in read_diary(life.folder / f"{life.kind}.jsonl")
        if "crash" in event
    ]
    return "workers that ended by another error", len(crashes), "; ".join(crashes or [f"exit code {c}" for c in codes if c])


def check_flat(life: Life) -> Check:
    """The last quarter of the time without kills against its second one (the first is for warming up)."""
    samples = life.samples
    quarter = len(samples) // 4
    if quarter < 20:
        return f"{life.kind}: memory and descriptors flat", len(samples), "it did not live long enough to tell"
    memory, descriptors = ([sample[i] for sample in samples] for i in (0, 1))
    before, after = sorted(memory[quarter : 2 * quarter])[quarter // 2], sorted(memory[-quarter:])[quarter // 2]
    problem = ""
    if after > before * 1.1 + (16 << 20):
        problem = f"memory grew from {before >> 20} to {after >> 20} MiB"
    if max(descriptors[-quarter:]) > max(descriptors[: 2 * quarter]) + 4:
        problem += f" descriptors grew from {max(descriptors[: 2 * quarter])} to {max(descriptors[-quarter:])}"
    return f"{life.kind}: {after >> 20} MiB, {max(descriptors[-quarter:])} descriptors, flat", len(samples), problem.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--brief", action="store_true", help="kill more often, and do not judge memory and descriptors")
    parser.add_argument("--worker", choices=list(WORKERS))
    parser.add_argument("--folder", type=Path)
    given = parser.parse_args()
    if given.worker:
        worker(given.worker, given.folder)
        return
    folder = given.folder or OUT / f"soak-{time.strftime('%Y%m%d-%H%M%S')}"
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    kill_every, steady = (2.5, False) if given.brief else (4.0, True)
    well, page = soak(given.minutes * 60, folder, seed=given.seed, kill_every=kill_every, steady=steady)
    (folder / "verdict.md").write_text(page)
    print(page, f"written to {folder / 'verdict.md'}", sep="\n")
    sys.exit(not well)


if __name__ == "__main__":
    main()
