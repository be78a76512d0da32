"""A save: staging, uploading, taking over what an interrupted one has left."""
