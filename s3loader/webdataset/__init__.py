"""WebDataset reads through our stores: ``import s3loader.webdataset``, then ``wds.WebDataset("s3://bucket/{000..146}.tar")``.

The import registers an opener for ``s3://``, ``gs://``, ``az://`` and ``memory://``; connections, credentials and retries are
those of `s3loader.s3`. Import it at the top of the program: worker processes that are spawned begin there. Where a shard has an
index, the CRC32C of every member is checked on its way. `webdataset` needs no ``aws`` or ``gsutil`` any more; shell pipes that
only copy one object to standard output are read directly, too.

Local files are opened by WebDataset itself. For an order that resumes, `s3loader.torch.S3IterableDataset.from_webdataset`
reads the same shards.
"""

from __future__ import annotations

from s3loader.webdataset.opener import SCHEMES, gopen, register
from s3loader.webdataset.tar_stream import TarStream, open_tar_stream

__all__ = ["SCHEMES", "TarStream", "gopen", "open_tar_stream", "register"]

register()
