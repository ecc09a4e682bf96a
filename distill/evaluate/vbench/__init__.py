"""VBench around the product: plan, generate, check, run, score, compare, curve; scores no pixel itself."""
