"""JAX: train, be killed, run the same command again: it goes on with the next sample.

python -m examples.train_jax --url ./digits
"""

from __future__ import annotations

import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from examples._digits import CLASSES, FEATURES, digest, options, to_arrays
from s3loader import CheckpointManager, LatestN
from s3loader.jax import S3JaxIterable


def loss_of(params: dict[str, jax.Array], x: jax.Array, y: jax.Array) -> jax.Array:
    logits = jnp.tanh(x @ params["w1"]) @ params["w2"]
    return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(len(y)), y])


@jax.jit
def update(params: dict[str, jax.Array], x: jax.Array, y: jax.Array) -> tuple[dict[str, jax.Array], jax.Array]:
    loss, gradients = jax.value_and_grad(loss_of)(params, x, y)
    return jax.tree.map(lambda p, g: p - 0.1 * g, params, gradients), loss


def main() -> None:
    chosen = options(__doc__)
    mesh = Mesh(np.array(jax.devices()), ("data",))
    batches = S3JaxIterable.from_manifest(
        chosen.manifest, group="webdataset", batch_size=32, seed=1, transform=to_arrays,
        sharding=NamedSharding(mesh, PartitionSpec("data")),
    )  # fmt: skip
    keys = jax.random.split(jax.random.key(0))
    params = {"w1": jax.random.normal(keys[0], (FEATURES, 32)) / 8, "w2": jax.random.normal(keys[1], (32, CLASSES)) / 6}

    step = first_epoch = 0
    with CheckpointManager(chosen.run, keep=LatestN(2)) as manager:
        if manager.latest() is not None:
            items = manager.restore()
            params, step, first_epoch = items["params"], items["step"], items["loader"]["epoch"]
            batches.load_state_dict(items["loader"])
            print(f"resumed at step {step}")
        for epoch in range(first_epoch, chosen.epochs):
            batches.set_epoch(epoch)
            for x, y in batches:
                params, loss = update(params, x, y)
                step += 1
                if step % chosen.every == 0:
                    manager.save(step, {"params": params, "loader": batches, "step": step}).result()
                if step == chosen.kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)
            print(f"epoch {epoch}: loss {float(loss):.3f}")
    print(f"weights {digest(jax.tree.leaves(params))}")


if __name__ == "__main__":
    main()
