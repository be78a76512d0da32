"""``make demo``: pack, train, kill, resume, prove.

Exit code 0 only if the killed and resumed job saw the same samples in the same order, and ended
with the same weights, as a job that was never interrupted.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from examples.demo.data import write_digits
from examples.demo.pack import pack
from examples.demo.report import Run, picture, table
from s3loader import open_store
from s3loader.units import format_duration

EPOCHS, EVERY = 3, 20


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

    say("train without interruption, 2 workers")
    job(url, "straight", out, workers=2, title="uninterrupted, 2 workers")
    straight = Run.read(out / "straight.jsonl")
    epoch_steps = straight.end["step"] // EPOCHS
    kill_at = epoch_steps + epoch_steps // 2 + 3  # the middle of epoch 2, and not on a checkpoint

    say(f"train the same job, 2 workers, SIGKILL after step {kill_at}")
    job(url, "killed", out, workers=2, title="will be killed, 2 workers", kill_at=kill_at)
    restart = time.time()
    say("restart it with 3 workers")
    job(url, "killed", out, workers=3, title="resumed, 3 workers")
    killed = Run.read(out / "killed.jsonl")

    resumed_from = killed.starts[-1]["from_step"]
    first_step = next(s for s in killed.steps if s["time"] > restart)
    picture(out / "demo.png", straight, killed, kill_step=kill_at, resumed_from=resumed_from, epoch_steps=epoch_steps)
    rate, megabytes = straight.rate()
    same_sequence = straight.end["sequence"] == killed.end["sequence"]
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
        ("sample sequence", verdict(same_sequence, straight.end["sequence"], killed.end["sequence"])),
        ("final weights", verdict(same_weights, straight.end["weights"], killed.end["weights"])),
        ("picture", str(out / "demo.png")),
    ]
    print("\n" + table(rows) + "\n")
    if not (same_sequence and same_weights):
        print("The resumed run is NOT the uninterrupted run.", file=sys.stderr)
        return 1
    print("The killed and resumed run delivered the same samples in the same order and ended with the same weights.")
    return 0


def job(url: str, name: str, out: Path, *, workers: int, title: str, kill_at: int = 0) -> None:
    """Run one training process to its end (or to its death, if that was asked for)."""
    command = [sys.executable, "-m", "examples.demo.train", "--url", url, "--name", name, "--log", str(out / f"{name}.jsonl")]
    command += [
        "--workers",
        str(workers),
        "--epochs",
        str(EPOCHS),
        "--every",
        str(EVERY),
        "--kill-at",
        str(kill_at),
        "--title",
        title,
    ]
    code = subprocess.run(command, check=False).returncode
    expected = -signal.SIGKILL if kill_at else 0
    if code != expected:
        raise SystemExit(f"the training process ended with {code}, expected {expected}")


def clear(url: str) -> None:
    """Remove what an earlier demo left at `url`; nothing else is touched."""
    store = open_store(url)
    for prefix in ("dataset/", "runs/straight/", "runs/killed/"):
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
