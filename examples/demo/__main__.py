"""``make demo``: pack, train, kill, resume, prove.

Exit code 0 only if the killed and resumed job saw the same samples in the same order, and ended
with the same weights, as a job that was never interrupted; and saw the same samples when it was
resumed on two ranks.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from itertools import count
from pathlib import Path
from statistics import median

from examples.demo.data import write_digits
from examples.demo.pack import pack
from examples.demo.report import Run, picture, table
from s3loader import open_store
from s3loader.units import format_duration

EPOCHS, EVERY, BATCH = 3, 20, 32


def main() -> int:
    options = parse()
    out = Path(options.out).resolve()
    out.mkdir(parents=True, exist_ok=True)
    url = (options.url or f"file://{out}/store").rstrip("/")
    clear(url)
    for log in out.glob("*.jsonl"):
        log.unlink()

    say("pack")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(options.data) if options.data else Path(scratch)
        if not options.data:
            write_digits(folder)
        packed = pack(url, folder)
    say(f"packed {packed.samples} images into {packed.shards} shards in {format_duration(packed.seconds)}: {url}/dataset/")
    epoch_steps, kill_at = steps(packed.samples, options.data)

    say("train without interruption, 2 workers")
    job(url, "straight", out, workers=2, title="uninterrupted, 2 workers")
    straight = Run.read(out / "straight.jsonl")

    say(f"train the same job, 2 workers, SIGKILL after step {kill_at}")
    job(url, "killed", out, workers=2, title="will be killed, 2 workers", kill_at=kill_at)
    restart = time.time()
    say("restart it with 1 worker")
    job(url, "killed", out, workers=1, title="resumed, 1 worker")
    killed = Run.read(out / "killed.jsonl")

    say(f"once more, SIGKILL after step {kill_at}, and restart it on 2 ranks of half the batch")
    job(url, "ranks", out, workers=2, title="will be killed, 1 rank", kill_at=kill_at)
    job(url, "ranks", out, workers=1, title="resumed, 2 ranks", ranks=2)
    ranks = Run.read(out / "ranks.jsonl")

    resumed_from = killed.starts[-1]["from_step"]
    first_step = next(s for s in killed.steps if s["time"] > restart)
    picture(out / "demo.png", straight, killed, kill_step=kill_at, resumed_from=resumed_from, epoch_steps=epoch_steps)
    rate, megabytes = straight.rate()
    same_sequence = straight.end["sequence"] == killed.end["sequence"]
    same_on_ranks = straight.end["sequence"] == ranks.end["sequence"]
    apart = abs(ranks.end["weights_sum"] / straight.end["weights_sum"] - 1)
    same_weights = straight.end["weights"] == killed.end["weights"]
    rows = [
        ("store", url),
        ("samples", f"{packed.samples} x {EPOCHS} epochs, {straight.end['step']} steps"),
        ("training speed", f"{rate:,.0f} samples/s, {megabytes:.2f} MB/s of images (bound by this tiny model's training)"),
        ("killed at / resumed from", f"step {kill_at} / step {resumed_from} (checkpoint every {EVERY} steps)"),
        (
            "restart to first new step",
            format_duration(first_step["time"] - restart) + " (of it, Python and PyTorch start-up is most)",
        ),
        ("checkpoint save", format_duration(median(straight.end["saves_s"])) + " (median, until committed)"),
        ("checkpoint load", format_duration(killed.end["restore_s"])),
        ("resumed on 1 worker", "sample sequence " + verdict(same_sequence, straight.end["sequence"], killed.end["sequence"])),
        ("", "final weights " + verdict(same_weights, straight.end["weights"], killed.end["weights"])),
        ("resumed on 2 ranks", "sample sequence " + verdict(same_on_ranks, straight.end["sequence"], ranks.end["sequence"])),
        ("", f"weights within {apart:.0e} (two ranks add gradients in another order, so bits may differ)"),
        ("picture", str(out / "demo.png")),
    ]
    print("\n" + table(rows) + "\n")
    if not (same_sequence and same_weights and same_on_ranks and apart < 1e-3):
        print("The resumed run is NOT the uninterrupted run.", file=sys.stderr)
        return 1
    print("Killed and resumed, the job delivered the same samples in the same order and ended with the same weights.")
    return 0


def steps(samples: int, folder: str | None) -> tuple[int, int]:
    """(batches of an epoch, step at which a job is killed): the middle of epoch 2, behind a checkpoint but not on one.

    Raises:
        SystemExit: there are too few images for that.
    """
    epoch = samples // BATCH
    kill_at = middle(epoch)
    if kill_at <= EVERY:
        needed = BATCH * next(batches for batches in count() if middle(batches) > EVERY)
        raise SystemExit(
            f"{folder} has {samples} images, too few for this demo: it kills the job in the middle of its second epoch, and the"
            f" first checkpoint is at step {EVERY}; {needed} images are enough (batches of {BATCH})"
        )
    return epoch, kill_at + (kill_at % EVERY == 0)


def middle(epoch: int) -> int:
    """A step in the middle of epoch 2."""
    return epoch + epoch // 2 + 3


def job(url: str, name: str, out: Path, *, workers: int, title: str, kill_at: int = 0, ranks: int = 1) -> None:
    """Run one training job to its end (or to its death, if that was asked for)."""
    command = [sys.executable, "-m", "examples.demo.train", "--url", url, "--name", name, "--log", str(out / f"{name}.jsonl")]
    command += [
        "--workers",
        str(workers),
        "--epochs",
        str(EPOCHS),
        "--every",
        str(EVERY),
        "--batch-size",
        str(BATCH),
        "--kill-at",
        str(kill_at),
        "--title",
        title,
    ]
    envs: list[dict[str, str]] = [{}]
    if ranks > 1:
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(ranks)}
        envs = [{**shared, "RANK": str(rank)} for rank in range(ranks)]
    processes = [subprocess.Popen(command, env={**os.environ, **env}) for env in envs]
    codes = [process.wait() for process in processes]
    expected = -signal.SIGKILL if kill_at else 0
    if any(code != expected for code in codes):
        raise SystemExit(f"the training processes ended with {codes}, expected {expected}")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def clear(url: str) -> None:
    """Remove what an earlier demo left at `url`; nothing else is touched."""
    store = open_store(url)
    for prefix in ("dataset/", "runs/straight/", "runs/killed/", "runs/ranks/"):
        failures = store.delete_many([entry.key for entry in store.list(prefix)])
        if failures:
            raise failures[0].error


def verdict(same: bool, first: str, second: str) -> str:
    return f"identical (sha256 {first[:16]}...)" if same else f"DIFFERENT: {first[:16]}... and {second[:16]}..."


def say(text: str) -> None:
    print(f"--- {text}", flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make demo", description=__doc__)
    parser.add_argument("--data", help="a class-per-folder image directory (default: scikit-learn's digits)")
    parser.add_argument("--url", help="where to put everything (default: file://OUT/store)")
    parser.add_argument("--out", default="demo-output", help="folder for logs and the picture")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
