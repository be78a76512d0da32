"""s3loader: training data and checkpoints between object stores and PyTorch, TensorFlow and JAX."""

__version__ = "0.1.0"
