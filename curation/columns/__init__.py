"""A pool's own and measured columns as one table, thresholds, quantiles."""
