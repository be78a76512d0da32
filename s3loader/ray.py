"""Ray: ``pip install 's3loader[ray]'``."""

try:
    from s3loader_ray import ManifestDatasource as ManifestDatasource
    from s3loader_ray import ShardDatasink as ShardDatasink
    from s3loader_ray import read_manifest as read_manifest
    from s3loader_ray import write_shards as write_shards
except ModuleNotFoundError as error:
    if error.name not in ("ray", "pyarrow", "pandas"):
        raise
    raise ModuleNotFoundError("s3loader.ray needs Ray: pip install 's3loader[ray]'", name=error.name) from error

__all__ = ["ManifestDatasource", "ShardDatasink", "read_manifest", "write_shards"]
