"""torchrun: nodes may go while it runs, and the sequence of samples goes on exactly on those that are left.

torchrun --nnodes=1:4 --nproc-per-node=1 --max-restarts=10 --rdzv-backend=c10d --rdzv-endpoint=HOST:29400 \
    -m examples.train_torchrun --url ./digits
"""

from __future__ import annotations

import gc
from collections.abc import Callable

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from examples._digits import CLASSES, FEATURES, digest, parser_of, prepare, to_arrays
from s3loader import CheckpointManager
from s3loader.torch import S3DataLoader, S3IterableDataset

GLOBAL_BATCH = 24  # the same on every number of ranks: step and learning rate keep their meaning


def main(after_step: Callable[[int], None] | None = None) -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--steps", type=int, default=60)
    chosen = prepare(parser.parse_args())
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = nn.Sequential(nn.Linear(FEATURES, 32), nn.ReLU(), nn.Linear(32, CLASSES))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    dataset = S3IterableDataset.from_manifest(
        chosen.manifest, group="webdataset", batch_size=GLOBAL_BATCH // world, seed=1, return_type="bytes",
        transform=lambda sample: (*to_arrays(sample), sample["__key__"]),
    )  # fmt: skip
    loader = S3DataLoader(dataset, num_workers=0)

    step = 0
    with CheckpointManager(chosen.run, keep=None) as manager:  # rank, world size and job: from the process group
        state = {"model": model, "loader": loader}
        if manager.latest() is not None:
            manager.restore(target=state)
            step = manager.latest() or 0
            if rank == 0:
                print(f"resumed at step {step} on {world} ranks", flush=True)
        while step < chosen.steps:
            for samples in loader:
                pixels, labels, keys = zip(*samples, strict=True)
                loss = nn.functional.cross_entropy(model(torch.from_numpy(np.stack(pixels))), torch.tensor(labels))
                optimizer.zero_grad()
                loss.backward()
                for parameter in model.parameters():
                    assert parameter.grad is not None
                    dist.all_reduce(parameter.grad)
                    parameter.grad.div_(world)
                optimizer.step()
                step += 1
                seen: list[list[str]] = [[]] * world
                dist.all_gather_object(seen, list(keys))
                if rank == 0:
                    print(f"step {step} world {world} {' '.join(key for each in seen for key in each)}", flush=True)
                if step % chosen.every == 0:
                    manager.save(step, state).result()
                if after_step is not None:
                    after_step(step)
                if step == chosen.steps:
                    break
    if rank == 0:
        print(f"weights {digest(t.numpy() for t in model.state_dict().values())}", flush=True)
    gc.collect()  # else a thread of gloo may hold the last collective when the interpreter ends, and abort it (torch 2.13)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
