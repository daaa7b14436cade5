"""Metrics of a training: log, TensorBoard, W&B, FLOPs."""
