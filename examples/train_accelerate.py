"""Accelerate: train, be killed, run the same command again: it goes on with the next sample.

    accelerate launch -m examples.train_accelerate --url ./digits

The loader is not given to ``prepare``: it finds its rank by itself, and its state stays exact.
"""

from __future__ import annotations

import os
import signal

import torch
from accelerate import Accelerator
from torch import nn

from examples._digits import CLASSES, FEATURES, digest, options, to_arrays
from s3loader import CheckpointManager, LatestN
from s3loader.torch import S3DataLoader, S3IterableDataset


def main() -> None:
    chosen = options(__doc__)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    plain = nn.Sequential(nn.Linear(FEATURES, 32), nn.ReLU(), nn.Linear(32, CLASSES))
    model, optimizer = accelerator.prepare(plain, torch.optim.Adam(plain.parameters(), lr=1e-2))
    dataset = S3IterableDataset.from_manifest(
        chosen.manifest, group="webdataset", batch_size=32 // accelerator.num_processes, seed=1, tail="drop",
        return_type="bytes", transform=to_arrays, collate="fixed",
    )  # fmt: skip
    loader = S3DataLoader(dataset, num_workers=1)

    step = first_epoch = 0
    with CheckpointManager(chosen.run, keep=LatestN(2)) as manager:
        state = {"model": accelerator.unwrap_model(model), "optimizer": optimizer.optimizer, "loader": loader}
        latest = manager.latest()
        if latest is not None:
            manager.restore(latest, target=state)
            step, first_epoch = latest, loader.state_dict()["epoch"]
            accelerator.print(f"resumed at step {step}")
        for epoch in range(first_epoch, chosen.epochs):
            loader.set_epoch(epoch)
            for x, y in loader:
                loss = nn.functional.cross_entropy(model(x.to(accelerator.device)), y.to(accelerator.device))
                optimizer.zero_grad()
                accelerator.backward(loss)
                optimizer.step()
                step += 1
                if step % chosen.every == 0 and accelerator.is_main_process:
                    manager.save(step, state).result()
                if step == chosen.kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)
            accelerator.print(f"epoch {epoch}: loss {loss.item():.3f}")
    accelerator.end_training()
    accelerator.print(f"weights {digest(t.numpy() for t in accelerator.unwrap_model(model).state_dict().values())}")


if __name__ == "__main__":
    main()
