"""TensorFlow adapter of s3loader; import it as `s3loader.tensorflow`."""

from s3loader_tensorflow.dataset import S3TFLoader, make_tf_dataset
from s3loader_tensorflow.keras import S3StateCallback

__all__ = ["S3StateCallback", "S3TFLoader", "make_tf_dataset"]
