"""Protocols that learn from a set's train split: probes and nearest neighbours on frozen features, fine-tuning."""
