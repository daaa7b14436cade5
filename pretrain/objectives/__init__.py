"""What a training minimises. One file an objective, beside its paper."""

from infra.registry import Registry

OBJECTIVES = Registry("objective", {"clip": "pretrain.objectives.clip:CLIP"})
