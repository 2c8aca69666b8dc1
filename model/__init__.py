"""The ground floor: a decoder as a stack of layers, its checkpoint, its config, its data."""

if __name__ != "layerprune.model":
    raise ImportError("import this package as layerprune.model: a second copy under a bare name would have unequal classes")
