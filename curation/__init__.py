"""Curation: measures (columns computed from samples), filters (decisions over columns), subsets, resharding."""
