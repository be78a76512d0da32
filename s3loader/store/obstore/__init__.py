"""The obstore engine."""
