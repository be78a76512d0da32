"""Ray: pack a folder on a cluster, read the samples as a ray.data.Dataset, write what became of them.

python -m examples.ray_pack --url ./digits-on-ray            (a cluster on this machine)
RAY_ADDRESS=auto python -m examples.ray_pack --url s3://bucket/digits
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import ray

from examples.demo.data import write_digits
from s3loader import pack
from s3loader.ray import read_manifest, write_shards


def with_size(row: dict[str, Any]) -> dict[str, Any]:
    return {"__key__": row["__key__"], "png": row["png"], "json": {"bytes": len(row["png"]), "class": int(row["cls"])}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="./digits-on-ray", help="folder that all nodes see, or s3://bucket/prefix")
    url = parser.parse_args().url.rstrip("/")
    if not ray.is_initialized():
        ray.init(log_to_driver=False)
    with tempfile.TemporaryDirectory() as folder:  # on a cluster: a folder that all nodes see
        write_digits(Path(folder))
        report = pack(folder, f"{url}/packed", shard_size="128KiB", exists="replace", engine="ray")
    print(f"packed {report.samples} samples in {report.shards} shards")
    samples = read_manifest(report.manifest)
    print(f"counted {samples.count()} rows")
    manifest = write_shards(samples.map(with_size), f"{url}/described", exists="replace")
    print(f"wrote {read_manifest(manifest).count()} rows to {manifest}")


if __name__ == "__main__":
    main()
