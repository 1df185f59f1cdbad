"""EROFS metadata images: a Tree as the kernel's own read-only filesystem, file data left in the layers.

`writer.write_image` writes one, `format` holds the on-disk structures and reads a superblock back.
"""
