"""Per-sample losses of fairseq's criterions: a registry, and one function for each criterion."""
