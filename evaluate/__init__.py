"""The measuring instrument: tasks, kinds, metrics, the stage that runs them, the comparison and its report."""
