"""Per-sample losses of fairseq's criterions: the registry, and one function for each criterion."""
