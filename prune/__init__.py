"""Rank the blocks of a decoder and cut one out of its checkpoint."""

if __name__ != "layerprune.prune":
    raise ImportError("import this package as layerprune.prune: a second copy under a bare name would have unequal classes")
