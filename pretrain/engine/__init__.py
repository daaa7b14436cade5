"""DeepSpeed around an objective, ZeRO partitions, optimizers."""
