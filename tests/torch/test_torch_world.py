"""Ranks of `torch.distributed` and of device meshes, forks of a process that has read already, torchdata, Grain."""

import json
import subprocess
import sys
import textwrap

import pytest
from torch.utils.data import DataLoader
from torch_helpers import content, number, numbered, sequence

from s3loader.loader import GrainSource, from_manifest, from_prefix
from s3loader.testing import server
from s3loader.torch import S3DataLoader, S3IterableDataset

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create", "ignore:.*fork.*:DeprecationWarning")

SAMPLES = 200


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    return numbered(tmp_path_factory.mktemp("world"), SAMPLES)


GANG = textwrap.dedent(
    """
    import json, os, sys
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from s3loader.torch import S3DataLoader, S3IterableDataset

    def number(sample):
        return int(bytes(sample[:6].numpy()))

    def main():
        url, state, out, kind = sys.argv[1:5]
        dataset = S3IterableDataset(url, batch_size=8, seed=3)  # before anybody knows the ranks
        rank = int(os.environ.pop("MY_RANK"))
        dist.init_process_group("gloo", init_method=f"file://{out}.rendezvous", rank=rank, world_size=2)
        if kind == "mesh":
            # One data-parallel rank, two tensor-parallel peers: both get the same samples.
            mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "tp"))
            dataset = S3IterableDataset(url, batch_size=8, seed=3, device_mesh=mesh)
        loader = S3DataLoader(dataset, num_workers=1, multiprocessing_context="spawn" if kind == "spawn" else "fork")
        if state != "-":
            loader.load_state_dict(json.loads(state))
        ids = [[number(s) for s in batch] for batch in loader]
        with open(f"{out}.{rank}", "w") as file:
            json.dump(ids, file)
        dist.barrier()
        __import__("gc").collect()  # gloo of torch 2.13 may abort an ending process that still holds collectives
        dist.destroy_process_group()

    if __name__ == "__main__":
        main()
    """
)


@pytest.mark.parametrize("kind", ["fork", "spawn", "mesh"])
def test_two_ranks_of_gloo_continue_what_one_process_began(url, tmp_path, kind):
    script = tmp_path / "gang.py"
    script.write_text(GANG)
    first = S3DataLoader(url, batch_size=8, seed=3)
    batches = iter(first)
    head = [number(s) for _ in range(7) for s in next(batches)]
    state = json.dumps(first.state_dict())
    del batches
    out = tmp_path / "ids"
    import os

    gang = [
        subprocess.Popen(
            [sys.executable, script, url, state, out, kind], env={**os.environ, "MY_RANK": str(rank)}, stderr=subprocess.PIPE
        )
        for rank in range(2)
    ]
    for process in gang:
        _, errors = process.communicate(timeout=600)
        assert process.returncode == 0, errors.decode()
    ranks = [json.loads((tmp_path / f"ids.{rank}").read_text()) for rank in range(2)]
    if kind == "mesh":
        assert ranks[0] == ranks[1]
        rest = [i for batch in ranks[0] for i in batch]
    else:
        steps = max(map(len, ranks))
        rest = [i for step in range(steps) for batches in ranks if step < len(batches) for i in batches[step]]
    assert head + rest == sequence(url, batch_size=8, seed=3)


@pytest.fixture(scope="module")
def s3():
    with server("moto") as s3:
        store = s3.open_store(s3.bucket("world"))
        for i in range(24):
            store.put(f"o/{i:02d}.bin", content(i))
        store.close()
        yield s3


@pytest.mark.parametrize("engine", ["direct", "boto3"])
def test_used_in_the_parent_and_then_in_forked_workers(s3, engine):  # D6
    with s3.open_store("world", engine=engine) as store:
        source = from_prefix("o/", store=store)
        dataset = S3IterableDataset(source, batch_size=4, shuffle="none")
        here = [number(s) for batch in dataset for s in batch]
        loader = DataLoader(dataset, batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=600)
        assert [number(s) for batch in loader for s in batch] == here == list(range(24))


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:'set_vital' is deprecated")
@pytest.mark.parametrize("workers", [0, 2])
def test_torchdatas_stateful_dataloader_resumes_exactly(url, workers):
    stateful = pytest.importorskip("torchdata.stateful_dataloader")

    def make():
        return stateful.StatefulDataLoader(S3IterableDataset(url, batch_size=8), batch_size=None, num_workers=workers)

    first = make()
    batches = iter(first)
    head = [number(s) for _ in range(9) for s in next(batches)]
    state = first.state_dict()
    del batches
    second = make()
    second.load_state_dict(state)
    rest = [number(s) for batch in second for s in batch]
    assert head + rest == sequence(url, batch_size=8)


def test_grain_orders_and_we_read(url):
    grain = pytest.importorskip("grain")
    source = GrainSource(from_manifest(url))
    assert len(source) == SAMPLES
    data = grain.MapDataset.source(source).seed(1).shuffle().batch(10, batch_fn=list)
    got = [number(s) for i in range(len(data)) for s in data[i]]
    assert sorted(got) == list(range(SAMPLES))
    assert got != list(range(SAMPLES))
    assert [number(s) for s in source._getitems([5, 199, 5])] == [5, 199, 5]
    with pytest.raises(IndexError):
        source[SAMPLES]
