"""The autoencoder against its loss, and diffusion on the latents of one trained here."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.pretrain import tiny
from tests.pretrain.test_diffusion import batch_of, draw_image
from tests.pretrain.test_train import lines, run
from tests.pretrain.tiny import config, make_pool
from winnow.infra.errors import UsageError
from winnow.pretrain.config import PretrainConfig
from winnow.pretrain.diffusion.sampling import sample
from winnow.pretrain.encoder import encoder_digest, load_checkpoint, load_encoder
from winnow.pretrain.loop import make_objective
from winnow.pretrain.objectives.base import Sample

LATENT = {"unet": tiny.UNET["unet"]}  # the latents of 16 pixels have 8


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A training of 80 steps, and its pool."""
    out = tmp_path_factory.mktemp("autoencoder")
    (out / "data").mkdir()
    pool = make_pool(out / "data")
    run(pool, out / "one", settings())
    return out / "one", pool


def settings(**changes: Any) -> PretrainConfig:
    values = {"objective": "autoencoder", "model": tiny.AUTOENCODER, "samples_seen": 640, "lr": 3e-3, "log_every": 1}
    return config(**values | changes)


def test_loss_is_absolute_error_and_kl() -> None:
    """Per value what Rombach et al. sum over an image, the decoder fed with a draw of the latents."""
    c = settings(objective={"autoencoder": {"kl_weight": 0.5}})
    o = make_objective(c, 0)
    batch = batch_of(o, [Sample(image=draw_image(size=(16, 16), seed=i), text="") for i in range(4)])
    x = batch["image"].float() / 255 * 2 - 1
    posterior = o.net.net.encode(x).latent_dist  # type: ignore[union-attr,operator]
    z = posterior.mean + posterior.std * batch["noise"]
    error = (o.net.net.decode(z).sample - x).abs().mean()  # type: ignore[union-attr,operator]
    losses = o(batch)
    expected = error + 0.5 * posterior.kl().mean() / (3 * 16 * 16)
    torch.testing.assert_close(losses.total, expected)
    assert set(losses.parts) == {"loss", "absolute_error", "kl"}
    # The first batch sets the size of the latents, the next moves it a little.
    std = posterior.mean.std(correction=0)
    torch.testing.assert_close(o.net.latent_std, std.detach().view(1))  # type: ignore[union-attr]
    o({"image": 255 - batch["image"], "noise": batch["noise"]})
    other = o.net.net.encode(-x).latent_dist.mean.std(correction=0).detach()  # type: ignore[union-attr,operator]
    torch.testing.assert_close(o.net.latent_std, (0.9 * std + 0.1 * other).detach().view(1))  # type: ignore[union-attr]


def test_it_learns_and_loads(trained: tuple[Path, str]) -> None:
    out, _ = trained
    errors = [line["absolute_error"] for line in lines(out) if "absolute_error" in line]
    assert np.mean(errors[-8:]) < 0.75 * errors[0]
    encoder = load_encoder(str(out), device="cpu")
    assert (encoder.dim, encoder.image_size, encoder.has_text) == (3 * 8 * 8, 16, False)
    net: Any = load_checkpoint(str(out))
    image = torch.stack([encoder.preprocess(draw_image(colour, (16, 16))) for colour in tiny.COLOURS.values()])
    latents = net.latents(image)
    assert float(latents.std()) == pytest.approx(1, abs=0.3)
    torch.testing.assert_close(net.decode(latents), net.net(image).sample)


def test_latents_of_a_checkpoint_are_diffused(trained: tuple[Path, str], tmp_path: Path) -> None:
    """The frozen autoencoder travels with the diffusion's checkpoint, which no longer needs the first one."""
    mine = tmp_path / "autoencoder"
    shutil.copytree(trained[0], mine)
    params = {"timesteps": 20, "feature_timestep": 0, "autoencoder": str(mine), "prediction": "v"}
    c = config(objective={"diffusion": params}, model=LATENT, weight_decay=0.5)
    run(trained[1], tmp_path / "latent", c)
    first, kept = load_file(mine / "model.safetensors"), load_file(tmp_path / "latent" / "model.safetensors")
    for name, value in first.items():
        torch.testing.assert_close(kept[f"autoencoder.{name}"], value, rtol=0, atol=0)
    about = json.loads((tmp_path / "latent" / "config.json").read_text())
    assert about["objective"]["params"]["autoencoder"] == encoder_digest(str(mine))
    assert str(tmp_path) not in json.dumps(about)

    identity = c.identity()
    moved = shutil.move(mine, tmp_path / "moved")
    there = config(objective={"diffusion": params | {"autoencoder": str(moved)}}, model=LATENT, weight_decay=0.5)
    assert there.identity() == identity
    shutil.rmtree(moved)
    images = sample(str(tmp_path / "latent"), 2, steps=3, device="cpu")
    assert images.shape == (2, 3, 16, 16)
    encoder = load_encoder(str(tmp_path / "latent"), device="cpu")
    assert (encoder.dim, encoder.image_size) == (16, 16)
    net: Any = load_checkpoint(str(tmp_path / "latent"))
    x = torch.rand(2, 3, 16, 16) * 2 - 1
    alone: Any = make_objective(settings(), 0).net
    alone.load_state_dict(first)
    torch.testing.assert_close(net.latents(x), alone.latents(x))
    assert not any(value.requires_grad for value in net.autoencoder.parameters())


def test_wrong_autoencoders_are_refused(trained: tuple[Path, str], tmp_path: Path) -> None:
    large = {"unet": LATENT["unet"] | {"sample_size": 16}}
    c = config(objective={"diffusion": {"autoencoder": str(trained[0])}}, model=large)
    with pytest.raises(UsageError, match="sample_size is 16, the autoencoder's latents have 8 a side"):
        make_objective(c, 0)
    params = {"timesteps": 20, "feature_timestep": 0}
    run(trained[1], tmp_path, config(objective={"diffusion": params}, model=tiny.UNET, samples_seen=24))
    c = config(objective={"diffusion": {"autoencoder": str(tmp_path)}}, model=LATENT)
    with pytest.raises(UsageError, match="not an autoencoder checkpoint"):
        make_objective(c, 0)
    with pytest.raises(UsageError, match="not a checkpoint of a diffusion training"):
        sample(str(trained[0]), 1)
    with pytest.raises(UsageError, match="kl_weight must be at least 0"):
        settings(objective={"autoencoder": {"kl_weight": -1}})
