"""Keras adapter of s3loader, for every backend of Keras; found by the core at the first sight of one of its objects."""
