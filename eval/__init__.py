"""Measure a checkpoint: lm-eval tasks, normalised loss, speed of generation."""

if __name__ != "layerprune.eval":
    raise ImportError("import this package as layerprune.eval: a second copy under a bare name would have unequal classes")
