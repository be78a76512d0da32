"""Exchange: manifests, virtual keys and the store that reads and writes them (the s3exchange interface)."""
