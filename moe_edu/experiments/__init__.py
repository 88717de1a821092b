"""Small experiments with honest answers: what they ran, on how many seeds, and what came out, in `results/`."""
