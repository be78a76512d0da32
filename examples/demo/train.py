"""One training job: it resumes by itself from the last committed checkpoint.

This is the loop to copy. Everything that must survive a kill (weights, optimizer, position in
the data) goes into one checkpoint, which exists whole or not at all.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import io
import json
import os
import signal
import sys
import time
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import nn

from examples.demo.pack import CLASSES, MANIFEST
from s3loader import CheckpointManager, LatestN, S3ExchangeStore
from s3loader.torch import S3DataLoader, S3IterableDataset

SIDE = 16
IMAGE_SUFFIXES = ("png", "jpg", "jpeg", "bmp", "gif", "webp")


def to_tensors(sample: dict[str, Any]) -> dict[str, Any]:
    """One sample of the shard as tensors: gray pixels (1, SIDE, SIDE) in [0, 1] and a class number."""
    encoded = next(sample[suffix] for suffix in IMAGE_SUFFIXES if suffix in sample)
    image = Image.open(io.BytesIO(encoded)).convert("L").resize((SIDE, SIDE))
    pixels = torch.from_numpy(np.asarray(image, dtype=np.float32)).div(255).unsqueeze(0)
    return {"pixels": pixels, "label": int(bytes(sample["cls"])), "key": sample["__key__"], "bytes": len(encoded)}


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "pixels": torch.stack([sample["pixels"] for sample in samples]),
        "label": torch.tensor([sample["label"] for sample in samples]),
        "keys": [sample["key"] for sample in samples],
        "bytes": sum(sample["bytes"] for sample in samples),
    }


def make_model(classes: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(32 * (SIDE // 4) ** 2, classes),
    )  # fmt: skip


def weights_digest(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def average_gradients(model: nn.Module) -> None:
    """What DistributedDataParallel does, in the open."""
    for parameter in model.parameters():
        if parameter.grad is not None:
            dist.all_reduce(parameter.grad)
            parameter.grad /= dist.get_world_size()


def keys_of_all_ranks(keys: list[str]) -> list[str]:
    """The keys of one step in the order of the global sequence: rank after rank."""
    if not dist.is_initialized():
        return keys
    gathered: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, keys)
    return [key for part in gathered for key in part]


class Progress:
    """A bar on stderr, on a terminal only."""

    def __init__(self, title: str, total: int) -> None:
        self._bar: Any = None
        if sys.stderr.isatty() and not (dist.is_initialized() and dist.get_rank()):
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (TextColumn("{task.description:<34}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, console=Console(stderr=True), transient=False)
            self._task = self._bar.add_task(title, total=total)
            self._bar.start()

    def at(self, step: int) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


def train(options: argparse.Namespace) -> None:
    started = time.time()
    torch.manual_seed(0)
    torch.set_num_threads(1)  # one order of additions, so that equal runs give equal bits
    rank, world_size = 0, 1
    if "RANK" in os.environ:  # started once per rank, as torchrun does
        dist.init_process_group("gloo")
        rank, world_size = dist.get_rank(), dist.get_world_size()

    classes = json.loads(S3ExchangeStore(options.url).get_object(CLASSES).read())
    dataset = S3IterableDataset.from_manifest(
        f"{options.url}/{MANIFEST}", batch_size=options.batch_size // world_size, shuffle="block", seed=7, tail="drop",
        group="webdataset", return_type="bytes", transform=to_tensors, collate=collate,
    )  # fmt: skip
    loader = S3DataLoader(dataset, num_workers=options.workers)
    model = make_model(len(classes))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    loss_of = nn.CrossEntropyLoss()
    # all ranks hold the same state, so one of them saves, alone
    manager = CheckpointManager(f"{options.url}/runs/{options.name}", keep=LatestN(3), rank=0, world_size=1)

    step, first_epoch, sequence, restore_s = 0, 0, "", 0.0
    if (latest := manager.latest()) is not None:
        before = time.perf_counter()
        items = manager.restore(latest)
        model.load_state_dict(items["model"])
        optimizer.load_state_dict(items["optimizer"])
        loader.load_state_dict(items["loader"])
        step, first_epoch, sequence = items["progress"]["step"], items["progress"]["epoch"], items["progress"]["sequence"]
        restore_s = time.perf_counter() - before

    # Stays open until the process ends, or is killed. All ranks do the same; one tells.
    log = open(options.log if rank == 0 else os.devnull, "a", buffering=1)  # noqa: SIM115
    log.write(json.dumps({"event": "start", "time": started, "from_step": step, "workers": options.workers}) + "\n")
    steps_per_epoch = len(loader)
    progress = Progress(options.title, options.epochs * steps_per_epoch)
    saves: list[float] = []
    first_batch_s: float | None = None
    for epoch in range(first_epoch, options.epochs):
        loader.set_epoch(epoch)
        for batch in loader:
            if first_batch_s is None:
                first_batch_s = time.time() - started
            loss = loss_of(model(batch["pixels"]), batch["label"])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            if world_size > 1:
                average_gradients(model)
            optimizer.step()
            step += 1
            keys = keys_of_all_ranks(batch["keys"])
            sequence = hashlib.sha256((sequence + "\n".join(keys)).encode()).hexdigest()
            record = {"step": step, "epoch": epoch, "time": time.time(), "loss": loss.item(), "samples": len(keys)}
            log.write(json.dumps({"event": "step", "bytes": batch["bytes"], "sequence": sequence, **record}) + "\n")
            progress.at(step)
            if rank == 0 and (step % options.every == 0 or step == options.epochs * steps_per_epoch):
                before = time.perf_counter()
                manager.save(step, {
                    "model": model.state_dict(), "optimizer": optimizer.state_dict(), "loader": loader.state_dict(),
                    "progress": {"step": step, "epoch": epoch, "sequence": sequence},
                }).result()  # fmt: skip
                saves.append(time.perf_counter() - before)
            if step == options.kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
    progress.close()
    manager.close()
    if dist.is_initialized():
        gc.collect()  # else gloo may abort the process as it ends (torch 2.13)
        dist.destroy_process_group()
    log.write(json.dumps({
        "event": "end", "time": time.time(), "step": step, "sequence": sequence, "weights": weights_digest(model),
        "weights_sum": sum(float(t.double().abs().sum()) for t in model.state_dict().values()),
        "restore_s": restore_s, "first_batch_s": first_batch_s, "saves_s": saves,
    }) + "\n")  # fmt: skip


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", required=True, help="where the dataset is and the checkpoints go")
    parser.add_argument("--name", required=True, help="name of the run")
    parser.add_argument("--log", required=True, help="JSON lines file to append to")
    parser.add_argument("--title", default="training")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--every", type=int, default=20, help="steps between checkpoints")
    parser.add_argument("--kill-at", type=int, default=0, help="SIGKILL itself after this step")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    train(parse())
