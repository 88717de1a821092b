"""Small experiments with honest answers. `results/` holds what they ran, on how many seeds, and the outcome."""
