"""Lightning: train, be killed, run the same command again: it goes on with the next sample.

    python -m examples.train_lightning --url ./digits

Lightning saves and loads the state of any loader that has ``state_dict``; `S3DataLoader` has.
"""

from __future__ import annotations

import logging
import os
import signal
import warnings
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import nn

from examples._digits import CLASSES, FEATURES, digest, options, to_arrays
from s3loader.torch import S3DataLoader, S3IterableDataset


class Model(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(FEATURES, 32), nn.ReLU(), nn.Linear(32, CLASSES))

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self.net(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-2)


class KillAt(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    chosen = options(__doc__)
    warnings.filterwarnings("ignore", module="lightning")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    dataset = S3IterableDataset.from_manifest(
        chosen.manifest, group="webdataset", batch_size=32, seed=1, tail="drop",
        return_type="bytes", transform=to_arrays, collate="fixed",
    )  # fmt: skip
    loader = S3DataLoader(dataset, num_workers=1)
    folder = Path(chosen.run)
    saved = sorted(folder.glob("step=*.ckpt"))
    if saved:
        print(f"resumed at step {int(saved[-1].stem.removeprefix('step='))}")
    model = Model()
    saver = ModelCheckpoint(folder, "{step:06d}", every_n_train_steps=chosen.every, save_top_k=-1)
    trainer = lightning.Trainer(
        max_epochs=chosen.epochs, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[saver, KillAt(chosen.kill_at)],
    )  # fmt: skip
    trainer.fit(model, loader, ckpt_path=str(saved[-1]) if saved else None, weights_only=False)
    print(f"weights {digest(t.numpy() for t in model.state_dict().values())}")


if __name__ == "__main__":
    main()
