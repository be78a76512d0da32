"""PyTorch: train, be killed, run the same command again: it goes on with the next sample.

python -m examples.train_torch --url ./digits --workers 2
"""

from __future__ import annotations

import os
import signal

import torch
from torch import nn

from examples._digits import CLASSES, FEATURES, digest, options, to_arrays
from s3loader import CheckpointManager, LatestN
from s3loader.torch import S3DataLoader, S3IterableDataset


def main() -> None:
    chosen = options(__doc__)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = nn.Sequential(nn.Linear(FEATURES, 32), nn.ReLU(), nn.Linear(32, CLASSES))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    dataset = S3IterableDataset.from_manifest(
        chosen.manifest, group="webdataset", batch_size=32, seed=1, return_type="bytes", transform=to_arrays, collate="fixed"
    )
    loader = S3DataLoader(dataset, num_workers=2)

    step = first_epoch = 0
    with CheckpointManager(chosen.run, keep=LatestN(2)) as manager:
        state = {"model": model, "optimizer": optimizer, "loader": loader}
        if manager.latest() is not None:
            items = manager.restore(target=state)  # fills the tensors in place
            step, first_epoch = manager.latest() or 0, loader.state_dict()["epoch"]
            print(f"resumed at step {step}: {', '.join(items)}")
        for epoch in range(first_epoch, chosen.epochs):
            loader.set_epoch(epoch)
            for x, y in loader:
                loss = nn.functional.cross_entropy(model(x), y)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                step += 1
                if step % chosen.every == 0:
                    manager.save(step, state).result()
                if step == chosen.kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)
            print(f"epoch {epoch}: loss {loss.item():.3f}")
    print(f"weights {digest(t.numpy() for t in model.state_dict().values())}")


if __name__ == "__main__":
    main()
