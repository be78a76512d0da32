"""Real Accelerate, Lightning and transformers: a loader is prepared, taken apart and made again, on one process and on two."""

import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from torch.utils.data import DataLoader
from torch_helpers import numbered, numbers

from s3loader.errors import ConfigError
from s3loader.torch import S3DataLoader, S3IterableDataset

pytestmark = pytest.mark.filterwarnings("ignore")

SAMPLES, BATCH = 40, 4


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    return numbered(tmp_path_factory.mktemp("trainers"), SAMPLES)


def as_number(sample):
    return {"x": torch.tensor([float(int(bytes(sample[:6].numpy())))])}


def stacked(samples):
    return {"x": torch.stack([sample["x"] for sample in samples])}


def ids(batches):
    return [int(value) for batch in batches for value in batch["x"].reshape(-1)]


def options(**more):
    return {"batch_size": BATCH, "transform": as_number, "collate": stacked, **more}


# -- what is taken apart ---------------------------------------------------------------------

HONOURED = {
    "batch_size": (5, lambda loader: len(next(iter(loader))) == 5),
    "shuffle": (False, lambda loader: numbers(loader) == list(range(SAMPLES))),
    "num_workers": (1, lambda loader: sorted(numbers(loader)) == list(range(SAMPLES))),
    "collate_fn": (len, lambda loader: list(loader) == [BATCH] * 10),
    "pin_memory": (False, lambda loader: loader.pin_memory is False),
    "drop_last": (True, lambda loader: loader.drop_last and loader.dataset.tail == "drop"),
    "timeout": (30, lambda loader: loader.timeout == 30),
    "worker_init_fn": (os.getpid, lambda loader: loader.worker_init_fn is os.getpid),
    "multiprocessing_context": ("spawn", lambda loader: loader.multiprocessing_context.get_start_method() == "spawn"),
    "generator": (torch.Generator(), lambda loader: loader.generator is not None),
    "prefetch_factor": (3, lambda loader: loader.prefetch_factor == 3),
    "persistent_workers": (True, lambda loader: loader.persistent_workers),
    "pin_memory_device": ("", lambda loader: True),
}
REFUSED = {"sampler": [1], "batch_sampler": [[1]], "in_order": False}
NEED_WORKERS = {"timeout", "multiprocessing_context", "prefetch_factor", "persistent_workers"}


def test_every_option_of_torchs_dataloader_is_honoured_or_refused(url):
    import inspect

    known = set(inspect.signature(DataLoader.__init__).parameters) - {"self", "dataset"}
    assert known <= {*HONOURED, *REFUSED}
    for name, (value, holds) in HONOURED.items():
        more = {"num_workers": 1} if name in NEED_WORKERS else {}
        assert holds(S3DataLoader(url, **{"batch_size": BATCH, **more, name: value})), name
    for name, value in REFUSED.items():
        with pytest.raises(ConfigError, match=name):
            S3DataLoader(url, batch_size=BATCH, **{name: value})
    for wrong in ({"drop_last": True, "tail": "pad"}, {"collate_fn": len, "collate": len}, {"on_break": "stop"}):
        with pytest.raises(ConfigError):
            S3DataLoader(url, batch_size=BATCH, **wrong)
    dataset = S3IterableDataset(url, batch_size=BATCH)
    for wrong in ({"batch_size": 5}, {"drop_last": True}, {"collate_fn": len}, {"seed": 1}):
        with pytest.raises(ConfigError):
            S3DataLoader(dataset, **wrong)


def arguments(loader):
    """What a trainer finds of a loader to make it again."""
    names = ("batch_size", "num_workers", "collate_fn", "drop_last", "timeout", "prefetch_factor", "in_order", "generator")
    return {name: getattr(loader, name) for name in names}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("more", [
    {"transform": as_number, "collate": stacked}, {"return_type": "bytes"}, {"collate": "ragged"},
    {"tail": "drop", "batch_size": 6},
])  # fmt: skip
def test_a_loader_is_made_again_from_its_own_arguments(url, workers, more):
    def plain(batches):
        return repr([batch.rows() if hasattr(batch, "rows") else batch for batch in batches])

    loader = S3DataLoader(url, num_workers=workers, **{"batch_size": BATCH, **more})
    whole, second = plain(loader), plain(loader)
    assert len(loader.dataset) == (36 if "tail" in more else SAMPLES)
    loader = S3DataLoader(url, num_workers=workers, **{"batch_size": BATCH, **more})
    again = S3DataLoader(loader.dataset, sampler=None, batch_sampler=None, **arguments(loader))
    assert (len(again), plain(again), plain(again)) == (len(loader), whole, second)
    torchs = DataLoader(loader.dataset, **arguments(loader))
    assert (len(torchs), plain(torchs)) == (len(loader), whole)


# -- Accelerate ------------------------------------------------------------------------------

GANG = textwrap.dedent(
    """
    import json, os, sys
    import torch
    from accelerate import Accelerator, DataLoaderConfiguration
    from torch.utils.data import DataLoader
    sys.path.insert(0, os.path.dirname(os.path.abspath(sys.argv[1])))
    from test_trainers import as_number, ids, options, stacked, BATCH
    from s3loader.torch import S3DataLoader, S3IterableDataset, prepare_loader

    def made(kind, url, workers):
        more = {"num_workers": workers}
        if kind.endswith("spawn"):
            more["multiprocessing_context"] = "spawn"
        if kind == "prepare_loader":
            return S3DataLoader(url, **options(tail="drop"), **more)
        if kind.startswith("S3DataLoader"):
            return S3DataLoader(url, **options(), **more)
        dataset = S3IterableDataset(url, batch_size=BATCH, yields="samples", transform=as_number)
        return DataLoader(dataset, batch_size=BATCH, collate_fn=stacked, **more)

    def main():
        _, _, url, out = sys.argv
        out += os.environ["RANK"]
        got = {}
        for dispatch in (True, False):
            accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(dispatch_batches=dispatch))
            for kind, workers in (("S3DataLoader", 0), ("S3DataLoader-spawn", 1), ("DataLoader", 2)):
                if dispatch and kind.endswith("spawn"):
                    continue
                loader = accelerator.prepare(made(kind, url, workers))
                got[f"{kind} {workers} {dispatch}"] = [ids(loader), ids(loader)] if not workers else [ids(loader)]
        own = prepare_loader(accelerator, made("prepare_loader", url, 0))
        assert accelerator.prepare(own) is own
        first = next(iter(own))
        own.load_state_dict(own.state_dict())
        got["prepare_loader"] = [ids([first]) + ids(own), ids(own)]
        got["size"] = [own.total_batch_size, own.total_dataset_length, len(own)]
        with open(out, "w") as file:
            json.dump(got, file)

    if __name__ == "__main__":
        main()
    """
)


def test_two_processes_of_accelerate_get_every_sample_once(url, tmp_path):
    pytest.importorskip("accelerate")
    import socket

    script = tmp_path / "gang.py"
    script.write_text(GANG)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    gang = [
        subprocess.Popen(
            [sys.executable, script, __file__, url, str(tmp_path / "out")],
            env={**os.environ, **place, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
        )
        for rank in range(2)
    ]
    for process in gang:
        _, errors = process.communicate(timeout=900)
        assert process.returncode == 0, errors.decode()
    ranks = [json.loads((tmp_path / f"out{rank}").read_text()) for rank in range(2)]
    assert ranks[0].pop("size") == ranks[1].pop("size") == [2 * BATCH, SAMPLES, SAMPLES // BATCH // 2]
    for kind, epochs in ranks[0].items():
        for epoch, part in enumerate(epochs):
            both = sorted(part + ranks[1][kind][epoch])
            if kind == "DataLoader 2 False":  # Accelerate fills the last step of each worker with samples of its first
                assert len(both) == SAMPLES + 2 * BATCH, both
                both = sorted(set(both))
            assert both == list(range(SAMPLES)), (kind, epoch)
        assert epochs[0] != epochs[-1] or len(epochs) == 1, kind


def test_accelerate_prepares_on_one_process_and_saves_the_state(url, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    from s3loader.torch import prepare_loader

    accelerator = accelerate.Accelerator(cpu=True)
    whole = ids(S3DataLoader(url, **options()))
    assert ids(accelerator.prepare(S3DataLoader(url, **options()))) == whole
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=4)
    model = torch.nn.Linear(1, 1)
    model, optimizer, loader = accelerator.prepare(
        model, torch.optim.SGD(model.parameters(), 1e-6), prepare_loader(accelerator, S3DataLoader(url, **options()))
    )
    synced, got = [], []
    for batch in loader:
        with accelerator.accumulate(model):
            accelerator.backward(model(batch["x"]).sum())
            synced.append(accelerator.sync_gradients)
            optimizer.step()
        got += ids([batch])
        if len(synced) == 3:
            accelerator.save_state(str(tmp_path / "saved"))
    assert got == whole
    assert [number for number, yes in enumerate(synced) if yes] == [3, 7, 9]
    accelerator.load_state(str(tmp_path / "saved"))
    assert ids(loader) == whole[12:]
    loader.set_epoch(0)
    assert ids(loader) == whole


# -- Lightning -------------------------------------------------------------------------------


def lightning_model():
    lightning = pytest.importorskip("lightning")

    class Model(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(1, 1)
            self.seen = []

        def training_step(self, batch, _):
            if not self.seen or self.seen[-1][0] != self.current_epoch:
                self.seen.append((self.current_epoch, []))
            self.seen[-1][1].extend(ids([batch]))
            return self.layer(batch["x"]).sum() * 0

        def predict_step(self, batch, _):
            return ids([batch])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    return lightning, Model()


def trainer(lightning, folder, **more):
    return lightning.Trainer(
        accelerator="cpu", default_root_dir=str(folder), logger=False, enable_progress_bar=False, enable_model_summary=False,
        **{"enable_checkpointing": False, **more},
    )  # fmt: skip


def test_lightning_trains_epochs_predicts_and_overfits(url, tmp_path):
    lightning, model = lightning_model()
    orders = [ids(list(loader)) for loader in [S3DataLoader(url, **options())] for _ in range(3)]
    trainer(lightning, tmp_path, max_epochs=2).fit(model, S3DataLoader(url, **options(), num_workers=1))
    assert [seen for _, seen in model.seen] == orders[:2]
    model.seen = []
    trainer(lightning, tmp_path, max_epochs=3, limit_train_batches=2).fit(model, S3DataLoader(url, **options()))
    assert [seen for _, seen in model.seen] == [order[:8] for order in orders]
    model.seen = []
    rest = S3DataLoader(url, **options(), on_break="rest")
    trainer(lightning, tmp_path, max_epochs=3, limit_train_batches=2).fit(model, rest)
    assert [seen for _, seen in model.seen] == [orders[0][:8], orders[0][8:16], orders[0][16:24]]
    predictions = trainer(lightning, tmp_path).predict(model, S3DataLoader(url, **options()))
    assert [i for batch in predictions for i in batch] == orders[0]
    model.seen = []
    trainer(lightning, tmp_path, max_epochs=2, overfit_batches=3).fit(model, S3DataLoader(url, **options(), on_break="again"))
    assert [seen for _, seen in model.seen] == [orders[0][:12]] * 2


def test_lightning_resumes_the_loader_with_its_checkpoint(url, tmp_path):
    lightning, model = lightning_model()
    orders = [ids(list(loader)) for loader in [S3DataLoader(url, **options())] for _ in range(3)]
    whole = [i for order in orders for i in order]
    keep = lightning.pytorch.callbacks.ModelCheckpoint(
        tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1, save_on_train_epoch_end=False
    )
    trainer(lightning, tmp_path, max_epochs=2, callbacks=[keep], enable_checkpointing=True).fit(
        model, S3DataLoader(url, **options(), num_workers=1)
    )
    for step in (3, 14):
        model.seen = []
        path = str(tmp_path / f"step={step}.ckpt")
        trainer(lightning, tmp_path, max_epochs=3).fit(model, S3DataLoader(url, **options()), ckpt_path=path)
        assert [i for _, seen in model.seen for i in seen] == whole[step * BATCH :]
    # What was saved at the end of an epoch says nothing of the loader, but of the epoch.
    first = trainer(lightning, tmp_path, max_epochs=1)
    first.fit(model, S3DataLoader(url, **options()))
    first.save_checkpoint(tmp_path / "end.ckpt")
    model.seen = []
    trainer(lightning, tmp_path, max_epochs=3).fit(model, S3DataLoader(url, **options()), ckpt_path=str(tmp_path / "end.ckpt"))
    assert [i for _, seen in model.seen for i in seen] == whole[SAMPLES:]
    # A state that was loaded by hand is not thrown away by a trainer that counts from 0.
    loader = S3DataLoader(url, **options())
    loader.load_state_dict({**loader.state_dict(), "epoch": 2, "consumed": 8})
    model.seen = []
    trainer(lightning, tmp_path, max_epochs=1).fit(model, loader)
    assert [i for _, seen in model.seen for i in seen] == orders[2][8:]


# -- transformers ----------------------------------------------------------------------------


def hf_trainer(folder, **more):
    transformers = pytest.importorskip("transformers")

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(1, 1)
            self.seen = []

        def forward(self, x):
            self.seen.extend(int(value) for value in x.reshape(-1))
            return {"loss": self.layer(x).sum() * 0}

    class Trainer(transformers.Trainer):
        loader = None

        def get_train_dataloader(self):
            return super().get_train_dataloader() if self.loader is None else self.loader(self.accelerator)

    arguments = {
        "per_device_train_batch_size": BATCH, "use_cpu": True, "report_to": [], "save_strategy": "no", "disable_tqdm": True,
        "num_train_epochs": 2, "remove_unused_columns": False, "logging_strategy": "no",
    }  # fmt: skip
    train_dataset = more.pop("train_dataset", None)
    return Trainer(
        model=Model(),
        args=transformers.TrainingArguments(output_dir=str(folder), **{**arguments, **more}),
        train_dataset=train_dataset,
        data_collator=stacked,
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_transformers_trains_on_the_dataset_and_on_a_prepared_loader(url, tmp_path, workers):
    pytest.importorskip("transformers")
    from s3loader.torch import prepare_loader

    orders = [ids(list(loader)) for loader in [S3DataLoader(url, **options())] for _ in range(2)]
    dataset = S3IterableDataset(url, batch_size=BATCH, yields="samples", transform=as_number)
    made = hf_trainer(tmp_path, train_dataset=dataset, dataloader_num_workers=workers)
    made.train()
    assert made.model.seen == orders[0] + orders[1]
    for prepare in (lambda accelerator, loader: accelerator.prepare(loader), prepare_loader, lambda _, loader: loader):
        made = hf_trainer(tmp_path)
        made.loader = lambda accelerator, prepare=prepare: prepare(accelerator, S3DataLoader(url, **options()))
        made.train()
        assert made.model.seen == orders[0] + orders[1]
