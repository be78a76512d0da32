"""A state taken apart into named tensors and put together again."""
