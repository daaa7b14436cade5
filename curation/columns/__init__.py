"""Pool columns and measured columns as one table; thresholds; quantiles."""
