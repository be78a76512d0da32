"""Shards: tar archives with an index, read and written one member at a time."""
