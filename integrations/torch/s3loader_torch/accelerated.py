"""`prepare_loader`: an `S3DataLoader` for Accelerate, of which every process reads only its own part."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from accelerate.data_loader import DataLoaderShard
from accelerate.utils import send_to_device

from s3loader.adapters import checked
from s3loader_torch.dataloader import S3DataLoader

__all__ = ["prepare_loader"]


@checked
def prepare_loader(accelerator: Any, loader: S3DataLoader) -> Any:
    """What ``accelerator.prepare(loader)`` is for, with each process reading its own part, and with the loader's own state.

    ``accelerator.prepare`` itself works, too: there one process reads for all of them (``dispatch_batches``), or each reads
    everything and leaves most of it out, and positions are Accelerate's business. Here ranks are those of the loader, batches
    come to the device, gradients are accumulated to the end of the epoch, and ``state_dict`` is the loader's, after the last
    batch that was given: ``accelerator.save_state`` and ``load_state`` keep it.

    Args:
        accelerator: An `accelerate.Accelerator`.
        loader: With ``tail="drop"`` or ``"pad"`` if there are several processes, as collectives need.
    """
    placed = accelerator.device if accelerator.device_placement else None
    prepared: Any = _Prepared(loader, placed, bool(accelerator.non_blocking))
    prepared._is_accelerate_prepared = True  # accelerator.prepare leaves it as it is
    accelerator._dataloaders.append(prepared)
    return prepared


class _Prepared(DataLoaderShard):  # type: ignore[misc]  # Accelerate has no types
    def __init__(self, loader: S3DataLoader, device: Any, non_blocking: bool) -> None:
        drop = loader.drop_last
        super().__init__(
            loader.dataset,
            device=device,
            batch_size=loader.batch_size,
            drop_last=drop,
            _drop_last=drop,
            _non_blocking=non_blocking,
            iteration=loader.epoch,
        )
        self.base_dataloader = loader
        self.use_stateful_dataloader = True  # save_state and load_state ask those for their state
        self.dl_state_dict = loader.state_dict()

    def __iter__(self) -> Iterator[Any]:  # pyright: ignore[reportIncompatibleMethodOverride]  # accelerate names no type
        loader, self.iteration = self.base_dataloader, None
        batches = iter(loader)
        self.begin()
        try:
            batch = next(batches, _END)
            while batch is not _END:
                if self.device is not None:
                    batch = send_to_device(batch, self.device, non_blocking=self._non_blocking)
                self.iteration = loader.epoch
                self.dl_state_dict = loader.state_dict()  # before the next one is asked for, which nobody has got yet
                coming = next(batches, _END)
                self.end_of_dataloader = coming is _END
                yield batch
                batch = coming
            self.iteration = loader.epoch + 1
        finally:
            self.end()
            batches.close()  # type: ignore[attr-defined]  # a generator

    def begin(self) -> None:
        """An iteration begins; `remainder` tells ``gather_for_metrics`` how much of the last step is no padding."""
        super().begin()
        source, plan_size = self.base_dataloader.source, self.base_dataloader.source.plan.size
        self.remainder = plan_size % self.total_batch_size if source.tail == "pad" else -1

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration; a loaded position in it is kept."""
        self.iteration = epoch
        self.base_dataloader.set_epoch(epoch)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a state in the next iteration."""
        self.base_dataloader.load_state_dict(state_dict)
        self.iteration = self.base_dataloader.epoch
        self.dl_state_dict = self.base_dataloader.state_dict()

    @property
    def total_batch_size(self) -> int:
        """Samples of one step over all processes."""
        source = self.base_dataloader.source
        return int(source.block * source.whole_rank().world_size)

    @property
    def total_dataset_length(self) -> int:
        """Samples of an epoch over all processes."""
        return int(self.base_dataloader.source.plan.size)


_END = object()
