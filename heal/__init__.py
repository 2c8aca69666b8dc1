"""Heal a cut with QLoRA and merge the adapter into the checkpoint."""

if __name__ != "layerprune.heal":
    raise ImportError("import this package as layerprune.heal: a second copy under a bare name would have unequal classes")
