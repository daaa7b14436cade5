"""What a training minimises: one file per objective."""

from winnow.infra.registry import Registry

OBJECTIVES = Registry(
    "objective",
    {
        "autoencoder": "winnow.pretrain.objectives.generative.autoencoder:Autoencoder",
        "clip": "winnow.pretrain.objectives.contrastive.clip:CLIP",
        "diffusion": "winnow.pretrain.objectives.generative.diffusion:Diffusion",
        "moco": "winnow.pretrain.objectives.contrastive.moco:MoCo",
        "siglip": "winnow.pretrain.objectives.contrastive.siglip:SigLIP",
        "simclr": "winnow.pretrain.objectives.contrastive.simclr:SimCLR",
    },
)
