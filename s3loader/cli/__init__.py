"""The `s3loader` command."""
