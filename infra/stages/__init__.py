"""The Stage contract, the runner, executors and progress."""
