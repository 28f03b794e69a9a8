"""What tracing costs, as ratios to the same step untraced: `make bench`, or `python -m tests.benchmarks`. No test."""
