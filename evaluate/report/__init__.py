"""The comparison of subsets: tables, plots, HTML."""
