"""From a folder, a table or a function to shards that can be trained on.

pack("./images", "s3://bucket/train")
optimize(make_sample, inputs, "s3://bucket/train", workers=8)
repack("s3://bucket/foreign/*.tar", "s3://bucket/train", shard_size="256MiB")
"""

from __future__ import annotations

from s3loader.packing.repack import plan_repack, repack
from s3loader.packing.run import Exists, PackPlan, PackReport, Verify, optimize, pack, plan_pack

__all__ = ["Exists", "PackPlan", "PackReport", "Verify", "optimize", "pack", "plan_pack", "plan_repack", "repack"]
