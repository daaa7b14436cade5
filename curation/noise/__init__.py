"""Known noise for benchmarks."""
