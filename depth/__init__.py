"""How deep a decoder thinks: probes of the residual stream, lenses, effective depth."""

if __name__ != "layerprune.depth":
    raise ImportError("import this package as layerprune.depth: a second copy under a bare name would have unequal classes")
