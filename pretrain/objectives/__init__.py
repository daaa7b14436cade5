"""What a training minimises. One file an objective, beside its paper."""

from infra.registry import Registry

OBJECTIVES = Registry(
    "objective",
    {
        "autoencoder": "pretrain.objectives.autoencoder:Autoencoder",
        "clip": "pretrain.objectives.clip:CLIP",
        "diffusion": "pretrain.objectives.diffusion:Diffusion",
        "moco": "pretrain.objectives.moco:MoCo",
        "siglip": "pretrain.objectives.siglip:SigLIP",
        "simclr": "pretrain.objectives.simclr:SimCLR",
    },
)
