"""A restore: verified ranges into targets, shared by the processes of a node."""
