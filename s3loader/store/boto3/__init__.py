"""The boto3 engine."""
