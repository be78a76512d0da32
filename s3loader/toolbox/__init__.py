"""Functions on URLs, for scripts and the shell: the public face is `s3loader.s3`."""
