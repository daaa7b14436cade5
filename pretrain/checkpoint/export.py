"""The checkpoint that users load: safetensors and configs."""

from __future__ import annotations

from typing import Any

import torch
from safetensors.torch import save_file

from winnow.infra.errors import WinnowError
from winnow.infra.io import storage
from winnow.infra.io.images import write_image
from winnow.pretrain.config import PretrainConfig
from winnow.pretrain.distributed import barrier, rank
from winnow.pretrain.engine.engine import Engine

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
OPEN_CLIP = "open_clip_config.json"


def export(engine: Engine, config: PretrainConfig, out: str, training: dict[str, Any]) -> None:
    """Write the encoder to the directory `out`; all processes call it, the first writes, `config.json` last.

    The files of an earlier training are removed first, so that those of two trainings never mix.

    The weights of an encoder that also reads text have open_clip's own names, so its directory is an open_clip
    "local-dir:" as well. The objective's images are saved next to them.

    `training` has facts about the training for `config.json`: JSON values that are the same on every run.
    """
    encoder = engine.objective.encoder()
    with engine.whole(list(encoder.parameters())):
        if rank() == 0:
            weights = {name: value.detach().cpu().contiguous() for name, value in engine.objective.weights().items()}
            if broken := [name for name, value in weights.items() if not value.isfinite().all()]:
                what = f"the training ended with weights that are not finite ({broken[0]} and {len(broken) - 1} more)"
                raise WinnowError(what, where=out, do="Take a smaller lr, or more warmup_steps.")
            for name in storage.list_names(out):
                if name in (CONFIG, OPEN_CLIP, WEIGHTS) or name.endswith(".png"):
                    storage.remove(storage.join(out, name))
            with storage.writing(storage.join(out, WEIGHTS)) as path:
                save_file(weights, path, metadata={"format": "pt"})
            model, preprocess = engine.objective.model, engine.objective.preprocess()
            if hasattr(encoder, "encode_text"):
                clip = {"model_cfg": model, "preprocess_cfg": preprocess}
                storage.write_json(storage.join(out, OPEN_CLIP), clip)
            cls, identity = type(engine.objective), config.identity()

            def exported() -> torch.nn.Module:
                made = cls.build_encoder(model, preprocess)
                made.load_state_dict(weights)
                return made.eval().requires_grad_(False).to(engine.device)

            for name, pixels in cls.images(exported).items():
                write_image(storage.join(out, f"{name}.png"), pixels)
            content = {
                "format": 1,
                "objective": {"name": config.objective_name, "params": identity["objective"][config.objective_name]},
                "model": model,
                "preprocess": preprocess,
                "training": {"config": identity, **training},
            }
            storage.write_json(storage.join(out, CONFIG), content)
    barrier()
