"""What is stored, as pure data: names of keys, records, checksummed segments, safetensors headers."""
