"""JAX adapter of s3loader; import it as `s3loader.jax`."""

from s3loader_jax.iterable import S3JaxIterable

__all__ = ["S3JaxIterable"]
