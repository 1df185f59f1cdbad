"""Where indexes are kept for others to find: a directory, S3, or beside the image in its registry."""
