"""Dynamic layer routing: which layers one prompt skips, executes or repeats, searched for and learnt."""

if __name__ != "layerprune.route":
    raise ImportError("import this package as layerprune.route: a second copy under a bare name would have unequal classes")
