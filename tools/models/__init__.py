"""Small checkpoints that tests, tools and benchmarks share: random weights, real layouts."""
