"""TensorFlow: ``pip install 's3loader[tensorflow]'``."""

try:
    from s3loader_tensorflow import S3StateCallback as S3StateCallback
    from s3loader_tensorflow import S3TFLoader as S3TFLoader
    from s3loader_tensorflow import make_tf_dataset as make_tf_dataset
    from s3loader_tensorflow.checkpoint_keras import S3BackupAndRestore as S3BackupAndRestore
except ModuleNotFoundError as error:
    if error.name not in {"tensorflow", "keras"}:
        raise
    message = "s3loader.tensorflow needs TensorFlow: pip install 's3loader[tensorflow]'"
    raise ModuleNotFoundError(message, name=error.name) from error

__all__ = ["S3BackupAndRestore", "S3StateCallback", "S3TFLoader", "make_tf_dataset"]
