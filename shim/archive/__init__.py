"""v1 archives: a whole image in one file, in Go clip's layout, with our index behind it."""
