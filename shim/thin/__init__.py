"""Thin images: ordinary images of one small layer, which name an index and hold what engines look at by themselves."""
