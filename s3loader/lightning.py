"""Lightning: ``pip install 's3loader[torch]' lightning``."""

try:
    from s3loader_torch.checkpoint_lightning import S3CheckpointIO as S3CheckpointIO
except ModuleNotFoundError as error:
    if error.name not in {"torch", "lightning", "lightning_fabric"}:
        raise
    raise ModuleNotFoundError("s3loader.lightning needs Lightning: pip install lightning", name=error.name) from error

__all__ = ["S3CheckpointIO"]
