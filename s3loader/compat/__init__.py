"""Other packages' interfaces over s3loader, for programs that were written for them."""
