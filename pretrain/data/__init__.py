"""From a subset to batches: samples, order, augmentation, loader."""
