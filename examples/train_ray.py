"""Ray Train: S3DataLoader in every worker; Ray restarts what dies, and the sequence goes on with the next sample.

python -m examples.train_ray --url ./digits --workers 2
"""

from __future__ import annotations

import json
import os
import signal
import tempfile
from pathlib import Path
from typing import Any

import ray.train
import torch
from ray.train.torch import TorchTrainer, prepare_model
from torch import nn

from examples._digits import CLASSES, FEATURES, digest, parser_of, prepare, to_arrays
from s3loader.torch import S3DataLoader, S3IterableDataset

GLOBAL_BATCH = 24


def train(config: dict[str, Any]) -> None:
    context = ray.train.get_context()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = prepare_model(nn.Sequential(nn.Linear(FEATURES, 32), nn.ReLU(), nn.Linear(32, CLASSES)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    dataset = S3IterableDataset.from_manifest(
        config["manifest"], group="webdataset", batch_size=GLOBAL_BATCH // context.get_world_size(), seed=1,
        return_type="bytes", transform=to_arrays, collate="fixed",
    )  # fmt: skip
    loader = S3DataLoader(dataset, num_workers=0)  # rank and world size: from the process group that Ray has made
    step = resumed = 0
    if (checkpoint := ray.train.get_checkpoint()) is not None:
        with checkpoint.as_directory() as folder:
            saved = torch.load(Path(folder) / "state.pt", weights_only=True)
            model.load_state_dict(saved["model"])
            step = resumed = saved["step"]
            loader.load_state_dict(json.loads((Path(folder) / "loader.json").read_text()))
    while step < config["steps"]:
        for x, y in loader:
            loss = nn.functional.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            if step % config["every"] == 0 or step == config["steps"]:
                weights = digest(tensor.numpy() for tensor in model.state_dict().values())
                with tempfile.TemporaryDirectory() as folder:  # the loader's state: some 200 bytes, the same on every rank
                    torch.save({"model": model.state_dict(), "step": step}, Path(folder) / "state.pt")
                    (Path(folder) / "loader.json").write_text(json.dumps(loader.state_dict()))
                    found = ray.train.Checkpoint.from_directory(folder) if context.get_world_rank() == 0 else None
                    ray.train.report(
                        {"step": step, "loss": loss.item(), "weights": weights, "resumed": resumed}, checkpoint=found
                    )
            if step == config["kill_at"] and not os.path.exists(config["killed"]):
                ray.train.get_all_reported_checkpoints()  # waits until Ray has what was reported
                Path(config["killed"]).touch()
                os.kill(os.getpid(), signal.SIGKILL)
            if step == config["steps"]:
                break


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--storage", default="", help="where Ray keeps its checkpoints; default: below URL")
    chosen = prepare(parser.parse_args())
    storage = os.path.abspath(chosen.storage or f"{chosen.url}/ray")
    os.makedirs(storage, exist_ok=True)
    config = {"manifest": chosen.manifest, "steps": chosen.steps, "every": chosen.every, "kill_at": chosen.kill_at,
              "killed": f"{storage}/killed-{os.path.basename(chosen.run)}"}  # fmt: skip
    trainer = TorchTrainer(
        train,
        train_loop_config=config,
        scaling_config=ray.train.ScalingConfig(num_workers=chosen.workers),
        run_config=ray.train.RunConfig(
            name=os.path.basename(chosen.run), storage_path=storage, failure_config=ray.train.FailureConfig(max_failures=3)
        ),
    )
    metrics = trainer.fit().metrics or {}
    if metrics["resumed"]:
        print(f"resumed at step {metrics['resumed']}")
    print(f"step {metrics['step']}: loss {metrics['loss']:.3f}")
    print(f"weights {metrics['weights']}")


if __name__ == "__main__":
    main()
