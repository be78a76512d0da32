"""``python -m s3loader``."""

from s3loader.cli.main import main

if __name__ == "__main__":
    main()
