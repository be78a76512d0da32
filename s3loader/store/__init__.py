"""The object layer."""
