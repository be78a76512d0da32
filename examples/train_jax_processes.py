"""JAX on several processes: one global mesh, sharded batches, and checkpoints that any number of processes restores.

python -m examples.train_jax_processes --url ./digits --coordinator 127.0.0.1:9911 --processes 2 --process 0 &
python -m examples.train_jax_processes --url ./digits --coordinator 127.0.0.1:9911 --processes 2 --process 1

On Kubernetes (JobSet), Slurm and TPU pods jax.distributed.initialize() finds these three by itself.
"""

from __future__ import annotations

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from examples._digits import CLASSES, FEATURES, digest, parser_of, prepare, to_arrays
from examples.train_jax import update
from s3loader import CheckpointManager
from s3loader.jax import S3JaxIterable

GLOBAL_BATCH = 24


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--coordinator", default="127.0.0.1:9911")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--process", type=int, default=0)
    parser.add_argument("--steps", type=int, default=30)
    chosen = parser.parse_args()
    if chosen.processes > 1:
        jax.distributed.initialize(chosen.coordinator, chosen.processes, chosen.process)
    chosen = prepare(chosen)
    mesh = Mesh(np.array(jax.devices()), ("data",))
    rows, columns = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec(None, "data"))
    batches = S3JaxIterable.from_manifest(
        chosen.manifest,
        group="webdataset",
        batch_size=GLOBAL_BATCH // chosen.processes,
        seed=1,
        transform=to_arrays,
        sharding=rows,
    )
    rng = np.random.default_rng(0)
    start = {"w1": rng.normal(size=(FEATURES, 32)) / 8, "w2": rng.normal(size=(32, CLASSES)) / 6}
    places = {"w1": columns, "w2": NamedSharding(mesh, PartitionSpec("data"))}  # spread over all devices
    params = {
        name: jax.make_array_from_callback(value.shape, places[name], lambda at, value=value: value[at].astype(np.float32))
        for name, value in start.items()
    }

    step = 0
    with CheckpointManager(chosen.run, keep=None) as manager:  # rank, world size and job: from jax.distributed
        if manager.latest() is not None:
            step = manager.latest() or 0
            items = manager.restore(target={"params": params, "loader": batches})  # in the layout of this mesh
            params = items["params"]
            print(f"resumed at step {step} on {chosen.processes} processes", flush=True)
        while step < chosen.steps:
            for x, y in batches:
                params, loss = update(params, x, y)
                step += 1
                if step % chosen.every == 0:
                    manager.save(step, {"params": params, "loader": batches}).result()
                if step == chosen.steps:
                    print(f"step {step}: loss {float(loss):.3f}", flush=True)
                    break
    whole = jax.jit(lambda tree: tree, out_shardings=NamedSharding(mesh, PartitionSpec()))(params)
    print(f"weights {digest(np.round(np.asarray(leaf), 3) for leaf in jax.tree.leaves(whole))}", flush=True)
    if chosen.processes > 1:
        jax.distributed.shutdown()


if __name__ == "__main__":
    main()
