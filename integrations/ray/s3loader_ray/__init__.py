"""Ray adapter of s3loader; import it as `s3loader.ray`."""

from s3loader_ray.reading import ManifestDatasource, read_manifest
from s3loader_ray.writing import ShardDatasink, write_shards

__all__ = ["ManifestDatasource", "ShardDatasink", "read_manifest", "write_shards"]
