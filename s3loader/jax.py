"""JAX: ``pip install 's3loader[jax]'``."""

try:
    from s3loader_jax import S3JaxIterable as S3JaxIterable
except ModuleNotFoundError as error:
    if error.name != "jax":
        raise
    raise ModuleNotFoundError("s3loader.jax needs JAX: pip install 's3loader[jax]'", name="jax") from error

__all__ = ["S3JaxIterable"]
