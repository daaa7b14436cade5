"""Pools of samples in tar shards: index, views, uids, DataComp metadata."""
