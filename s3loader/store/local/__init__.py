"""Files as a store."""
