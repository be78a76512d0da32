"""Backends around a backend: prefix, retry, limit, events, faults."""
