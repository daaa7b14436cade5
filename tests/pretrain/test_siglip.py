import json
import math
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch

from tests.pretrain.test_train import run
from tests.pretrain.tiny import MODEL, config, make_pool
from winnow.infra.params import ParameterError
from winnow.pretrain.encoder import load_encoder
from winnow.pretrain.loop import make_objective
from winnow.pretrain.objectives.contrastive.siglip import siglip_loss


def test_loss_is_equation_1_of_the_paper() -> None:
    x, y = np.random.default_rng(0).normal(size=(2, 7, 5))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    y /= np.linalg.norm(y, axis=1, keepdims=True)
    t, b = 3.7, -1.2
    total = 0.0
    for i in range(7):
        for j in range(7):
            z = 1 if i == j else -1
            total += math.log(1 / (1 + math.exp(z * (-t * x[i] @ y[j] - b))))
    loss, accuracy = siglip_loss(
        torch.from_numpy(x), torch.from_numpy(y), torch.tensor([t]).double(), torch.tensor([b]).double()
    )
    assert float(loss) == pytest.approx(-total / 7, abs=1e-6)
    assert float(accuracy) == pytest.approx(np.mean((x @ y.T).argmax(1) == np.arange(7)))


def test_it_starts_where_the_paper_does_and_learns_scale_and_bias() -> None:
    objective = make_objective(config(objective="siglip"), seed=0)
    metrics = {name: value.item() for name, value in objective.metrics().items()}
    assert metrics == pytest.approx({"logit_scale": 10.0, "logit_bias": -10.0})
    trained = dict(objective.named_parameters())
    for name in ("net.logit_scale", "net.logit_bias"):
        assert trained[name].requires_grad and not objective.decays(name, trained[name])
    with torch.no_grad():
        objective.net.logit_scale.fill_(9.0)
        objective.after_step(1)
    assert objective.net.logit_scale.item() == 9.0  # no bounds


@pytest.mark.parametrize("zero_stage", [0, 3])
def test_its_checkpoint_is_open_clips_with_scale_and_bias(zero_stage: int, tmp_path: Path) -> None:
    pool = make_pool(tmp_path)
    params = {"init_scale": 5.0, "init_bias": -4.0}
    weights = run(pool, tmp_path / "out", config(objective={"siglip": params}, zero_stage=zero_stage))
    assert weights["logit_bias"].shape == () and abs(float(weights["logit_bias"]) + 4) > 1e-3
    model = open_clip.create_model(f"local-dir:{tmp_path}/out").eval()
    assert model.logit_bias.item() == weights["logit_bias"].item()
    assert model.logit_scale.item() == weights["logit_scale"].item()
    encoder = load_encoder(str(tmp_path / "out"), device="cpu")
    x = torch.rand(3, 3, 32, 32)
    with torch.no_grad():
        expected = model.encode_image(x, normalize=True).numpy()
    np.testing.assert_allclose(encoder.encode_images(x), expected, atol=1e-6)
    assert encoder.logit_scale == pytest.approx(math.exp(weights["logit_scale"].item()))
    stored = json.loads((tmp_path / "out" / "open_clip_config.json").read_text())["model_cfg"]
    assert stored == MODEL | {"init_logit_scale": math.log(5.0), "init_logit_bias": -4.0}


def test_a_model_without_a_text_tower_is_refused() -> None:
    for name in ("clip", "siglip"):
        with pytest.raises(ParameterError, match="reads captions, and resnet18 of timm reads images only"):
            config(objective=name, model={"timm": "resnet18"})
