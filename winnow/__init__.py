"""Winnow: curate web image–text shards, pretrain on the subsets, and say which subset was better."""

__version__ = "0.1.0"
