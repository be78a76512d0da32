"""The commit protocol: roots, attempts, publishing, retention, garbage collection, compaction."""
