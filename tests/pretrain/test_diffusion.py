"""The objective against the paper's loss, and trainings whose samples and checkpoints are looked into."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests.pretrain import tiny
from tests.pretrain.test_train import close, lines, run
from tests.pretrain.tiny import COLOURS, config, make_pool
from winnow.infra.errors import UsageError, WinnowError
from winnow.infra.params import ParameterError
from winnow.pretrain.config import PretrainConfig
from winnow.pretrain.diffusion.sampling import grid, image_seeds, sample
from winnow.pretrain.encoder import load_encoder
from winnow.pretrain.loop import make_objective
from winnow.pretrain.models.diffusers import _OURS, AUTOENCODER, CONDITIONAL, UNET, arguments
from winnow.pretrain.objectives.base import Objective, Sample

CAPTIONED: dict[str, Any] = {
    "unet": tiny.UNET["unet"]
    | {
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
        "attention_head_dim": 4,
    },
    "text": {"context_length": 8, "width": 16, "heads": 2, "layers": 1},
}


def objective(model: dict[str, Any] = tiny.UNET, **params: Any) -> Objective:
    return make_objective(config(objective={"diffusion": params}, model=model), seed=0)


def draw_image(colour: tuple[int, ...] = (200, 30, 30), size: tuple[int, int] = (8, 8), seed: int = 0) -> Image.Image:
    noise = np.random.default_rng(seed).integers(-20, 20, (*size, 3))
    return Image.fromarray(np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8))


def batch_of(o: Objective, samples: list[Sample]) -> dict[str, torch.Tensor]:
    views = [o.views(sample, np.random.default_rng((7, i))) for i, sample in enumerate(samples)]
    return {name: torch.from_numpy(np.stack([view[name] for view in views])) for name in views[0]}


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_loss_is_l_simple(prediction: str) -> None:
    """Ho et al., equation 14, image by image; for v the target of Salimans & Ho."""
    o = objective(prediction=prediction, schedule="cosine")
    batch = batch_of(o, [Sample(image=draw_image(seed=i), text="") for i in range(5)])
    assert len(set(batch["timestep"].tolist())) > 1
    bars = np.cos((np.arange(1001) / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2
    bars = bars[1:] / bars[0]
    errors = []
    for image, t, epsilon in zip(batch["image"], batch["timestep"].tolist(), batch["noise"], strict=True):
        x0 = image.double() / 255 * 2 - 1
        x = np.sqrt(bars[t]) * x0 + np.sqrt(1 - bars[t]) * epsilon
        target = np.sqrt(bars[t]) * epsilon - np.sqrt(1 - bars[t]) * x0 if prediction == "v" else epsilon
        output = o.net.unet(x[None].float(), torch.tensor([t])).sample[0]  # type: ignore[union-attr]
        errors.append(float((output - target).square().mean().detach()))
    assert float(o(batch).total.detach()) == pytest.approx(np.mean(errors), rel=1e-4)


def test_parts_of_a_batch_have_together_the_gradient_of_the_whole() -> None:
    """So any number of processes, and any cut, trains alike."""
    o = objective(classes=list(COLOURS))
    batch = batch_of(o, [Sample(image=draw_image(seed=i), text="red") for i in range(6)])
    halves = [{name: value[i : i + 3] for name, value in batch.items()} for i in (0, 3)]
    weights = list(o.parameters())
    whole = torch.autograd.grad(o(batch).total, weights)
    parts = [torch.autograd.grad(o(half).total, weights) for half in halves]
    for expected, *got in zip(whole, *parts, strict=True):
        torch.testing.assert_close(sum(got) / 2, expected, rtol=1e-3, atol=1e-5)


def test_views_depend_on_the_generator_alone_and_drop_the_condition_at_its_rate() -> None:
    o = objective(classes=["cat", "dog"], drop=0.25)
    image = draw_image(size=(20, 31))
    first, again, other = (o.views(Sample(image=image, text="dog"), np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert not np.array_equal(first["noise"], other["noise"])
    assert first["image"].dtype == np.uint8 and first["image"].shape == (3, 8, 8)
    many = [o.views(Sample(image=image, text="dog", label=0), np.random.default_rng((3, i))) for i in range(800)]
    labels = [int(view["label"]) for view in many]
    assert set(labels) == {0, 2}  # the pool's label has priority over the caption; 2 is not a class
    assert labels.count(2) / 800 == pytest.approx(0.25, abs=0.06)
    mirrored = np.mean([np.array_equal(view["image"], many[0]["image"]) for view in many])
    assert mirrored == pytest.approx(0.5, abs=0.07)
    noise = np.stack([view["noise"] for view in many])
    assert noise.dtype == np.float32 and abs(noise.mean()) < 0.01 and noise.std() == pytest.approx(1, abs=0.01)
    assert np.corrcoef(noise.reshape(800, -1))[0, 1:].std() == pytest.approx(1 / np.sqrt(192), rel=0.2)
    times = [int(view["timestep"]) for view in many]
    assert np.mean(times) == pytest.approx(499.5, abs=4 * 289 / np.sqrt(800)) and max(times) < 1000

    assert {int(o.views(Sample(image=image, text="dog"), np.random.default_rng(i))["label"]) for i in range(40)} == {
        1,
        2,
    }
    with pytest.raises(WinnowError, match='the caption "a bird" is none of the 2 classes'):
        for i in range(40):
            o.views(Sample(image=image, text="a bird"), np.random.default_rng(i))


def test_the_whole_image_is_seen_as_in_evaluation() -> None:
    from winnow.pretrain.models.preprocessing import val_transform

    o = objective(flip=False)
    image = draw_image(size=(40, 40))
    seen = o.views(Sample(image=image, text=""), np.random.default_rng(0))["image"]
    torch.testing.assert_close(torch.from_numpy(seen.copy()) / 127.5 - 1, val_transform(o.preprocess())(image))


def test_captions_are_the_condition() -> None:
    o = objective(CAPTIONED, drop=0.5)
    views = [o.views(Sample(image=draw_image(), text="a cat"), np.random.default_rng(i))["label"] for i in range(20)]
    tokens = {tuple(view) for view in views}
    assert tokens == {tuple(o.net.tokenizer([text])[0].tolist()) for text in ("", "a cat")}  # type: ignore[union-attr]
    batch = batch_of(o, [Sample(image=draw_image(), text=text) for text in ("a cat", "a dog")])
    gradients = torch.autograd.grad(o(batch).total, o.net.text.token_embedding.weight)  # type: ignore[union-attr]
    assert gradients[0].abs().sum() > 0
    net = o.encoder().eval()
    images = [net.sample([(5,)], net.tokenizer([text]), steps=3, guidance=5.0) for text in ("a cat", "a dog", "")]  # type: ignore[operator]
    assert not torch.equal(images[0], images[1])
    # Without a caption, guidance has nothing to guide towards.
    torch.testing.assert_close(images[2], net.sample([(5,)], net.nothing(1), steps=3), rtol=0, atol=1)  # type: ignore[operator]


def test_a_trained_model_draws_the_class_it_is_told_to() -> None:
    """Images of four plain colours: samples lie nearest to their own class's colour."""
    torch.manual_seed(0)
    o = objective(classes=list(COLOURS), timesteps=100, flip=False, prediction="v")
    optimizer = torch.optim.AdamW(o.parameters(), lr=1e-2, weight_decay=0.0)
    rng = np.random.default_rng(0)
    for step in range(250):
        names = rng.choice(list(COLOURS), 16)
        samples = [
            Sample(image=draw_image(COLOURS[name], seed=step * 16 + i), text=name) for i, name in enumerate(names)
        ]
        views = [o.views(sample, rng) for sample in samples]
        batch = {name: torch.from_numpy(np.stack([view[name] for view in views])) for name in views[0]}
        optimizer.zero_grad()
        o(batch).total.backward()
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / 250)
        optimizer.step()
    net = o.encoder().eval()
    labels = torch.arange(16) % 4
    for sampler in ("ddim", "ancestral"):
        images = net.sample(image_seeds(0, 16), labels, steps=25, sampler=sampler)  # type: ignore[operator]
        means = images.float().mean((2, 3))
        distance = torch.cdist(means, torch.tensor(list(COLOURS.values())).float())
        assert (distance.argmin(1) == labels).float().mean() >= 0.9
        assert float(distance[torch.arange(16), labels].median()) < 40, distance


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A class-conditional training of 6 steps with a running mean of the weights, and its pool."""
    out = tmp_path_factory.mktemp("diffusion")
    (out / "data").mkdir()
    pool = make_pool(out / "data")
    run(pool, out / "one", conditional())
    return out, pool


def conditional(**changes: Any) -> PretrainConfig:
    names = [f"a {sorted(COLOURS)[i % 4]} picture number {i}" for i in range(40)]
    params = {"timesteps": 20, "feature_timestep": 2, "classes": names}
    values = {"objective": {"diffusion": params}, "model": tiny.UNET, "ema": 0.5, "log_every": 1}
    return config(**values | changes)


def test_a_checkpoint_draws_and_encodes(trained: tuple[Path, str]) -> None:
    out = trained[0] / "one"
    about = json.loads((out / "config.json").read_text())
    assert about["objective"]["name"] == "diffusion" and len(about["model"]["diffusion"]["classes"]) == 40
    encoder = load_encoder(str(out), device="cpu")
    assert (encoder.dim, encoder.image_size, encoder.has_text) == (16, 8, False)
    images = np.stack([encoder.preprocess(draw_image(colour)).numpy() for colour in COLOURS.values()])
    features = encoder.encode_images(images)
    np.testing.assert_allclose(encoder.encode_images(images[:1]), features[:1], atol=1e-5)
    assert len({row.tobytes() for row in features}) == 4

    five = sample(str(out), 5, steps=4, guidance=1.5, device="cpu")
    assert five.shape == (5, 3, 8, 8) and five.dtype == np.uint8
    np.testing.assert_array_equal(sample(str(out), 5, steps=4, guidance=1.5, device="cpu"), five)
    three = sample(str(out), 3, steps=4, guidance=1.5, device="cpu")
    assert np.abs(three.astype(int) - five[:3]).max() <= 1
    assert (sample(str(out), 5, steps=4, guidance=1.5, seed=1, device="cpu") != five).any()
    assert (sample(str(out), 5, steps=4, guidance=0.0, device="cpu") != five).any()

    # Next to the checkpoint: the images that a loaded model draws.
    expected = grid(sample(str(out), 64, steps=20, guidance=2.0, device="cpu"))
    found = np.asarray(Image.open(io.BytesIO((out / "samples.png").read_bytes())))
    assert found.shape == expected.shape == (82, 82, 3)
    assert np.abs(found.astype(int) - expected).max() <= 1


def test_middle_features_are_the_unets(trained: tuple[Path, str]) -> None:
    """At a timestep, of the noised image without its class, averaged over places: by the U-Net's own parts."""
    from winnow.pretrain.encoder import load_checkpoint

    net: Any = load_checkpoint(str(trained[0] / "one"))
    image = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    bar = np.cumprod(1 - np.minimum(np.linspace(50 * 1e-4, 50 * 0.02, 20), 0.999))[2]
    noise = torch.from_numpy(np.random.default_rng(0).standard_normal((3, 8, 8), np.float32))
    x = (np.sqrt(bar) * image + np.sqrt(1 - bar) * noise).float()
    unet, t = net.unet, torch.full((3,), 2)
    emb = unet.time_embedding(unet.time_proj(t)) + unet.class_embedding(torch.full((3,), 40))
    x = unet.conv_in(x)
    for block in unet.down_blocks:
        x, _ = block(hidden_states=x, temb=emb)
    expected = unet.mid_block(x, emb).mean((2, 3))
    torch.testing.assert_close(net.encode_image(image), expected, rtol=1e-4, atol=1e-5)


def test_two_processes_train_as_one(trained: tuple[Path, str], tmp_path: Path) -> None:
    weights = run(trained[1], tmp_path, conditional(num_processes=2))
    close(weights, load_file(trained[0] / "one" / "model.safetensors"))
    losses = [[line["loss"] for line in lines(out) if "loss" in line] for out in (tmp_path, trained[0] / "one")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize("stage", [2, 3])
def test_zero_trains_the_same_and_draws(stage: int, trained: tuple[Path, str], tmp_path: Path) -> None:
    c = conditional(zero_stage=stage, ema=None if stage == 3 else 0.5)
    weights = run(trained[1], tmp_path, c)
    losses = [[line["loss"] for line in lines(out) if "loss" in line] for out in (tmp_path, trained[0] / "one")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    if stage == 2:
        close(weights, load_file(trained[0] / "one" / "model.safetensors"))
    assert (tmp_path / "samples.png").exists()


def test_exported_weights_are_the_running_mean(trained: tuple[Path, str], tmp_path: Path) -> None:
    plain = run(trained[1], tmp_path, conditional(ema=None))
    mean = load_file(trained[0] / "one" / "model.safetensors")
    assert any(not torch.equal(plain[name], mean[name]) for name in plain)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"classes": ["a red"]}, 'unknown class "a red"'),
        ({"captions": ["a cat"]}, "not caption-conditional"),
        ({"steps": 21}, "from 1 to the model's 20"),
        ({"sampler": "dim"}, 'Did you mean "ddim"'),
    ],
)
def test_a_wrong_request_says_what_is_wrong(settings: dict, words: str, trained: tuple[Path, str]) -> None:
    with pytest.raises(UsageError, match=words):
        sample(str(trained[0] / "one"), 2, **{"steps": 5} | settings)


@pytest.mark.parametrize(
    ("model", "params", "words"),
    [
        ({"unet": {"sample_size": 8, "block_out_chanels": [8]}}, {}, 'Did you mean "block_out_channels"'),
        ({"unet": {"block_out_channels": [32] * 4}}, {}, "needs sample_size"),
        ({"unet": tiny.UNET["unet"] | {"sample_size": 7}}, {}, "cannot be halved"),
        ({"unet": tiny.UNET["unet"] | {"norm_num_groups": 3}}, {}, "multiples of norm_num_groups, 3"),
        ({"unet": tiny.UNET["unet"] | {"down_block_types": ["DownBlock2D"]}}, {}, "one entry for each of the 2"),
        ({"unet": tiny.UNET["unet"] | {"in_channels": 4}}, {}, "must leave in_channels alone"),
        (tiny.UNET | {"text": {"widht": 3}}, {}, 'Did you mean "width"'),
        ({"text": {"width": 3}}, {}, "give one of"),
        (tiny.MODEL, {}, "diffusion trains a unet, and the model is an encoder"),
        (tiny.AUTOENCODER, {}, "and the model is an autoencoder"),
        (tiny.UNET, {"schedul": "linear"}, 'Did you mean "schedule"'),
        (tiny.UNET, {"autoencoder": "nowhere"}, "nowhere is not a checkpoint folder"),
    ],
)
def test_a_wrong_recipe_says_what_is_wrong(model: dict, params: dict, words: str) -> None:
    with pytest.raises(ParameterError, match=words):
        config(objective={"diffusion": params}, model=model)


@pytest.mark.parametrize(
    ("model", "params", "words"),
    [
        (tiny.UNET, {"schedule": "square"}, "one of 'linear', 'cosine'"),
        (tiny.UNET, {"drop": 2}, "at most 1"),
        (tiny.UNET, {"classes": ["a", "a"]}, "different names"),
        (tiny.UNET, {"feature_timestep": 1000}, "below timesteps"),
        (CAPTIONED, {"classes": 3}, "either a class or a caption"),
        ({"unet": tiny.UNET["unet"] | {"mid_block_type": None}}, {}, "needs a middle block"),
        ({"unet": tiny.UNET["unet"] | {"down_block_types": ["Down", "Up"]}}, {}, "UNet2DModel cannot be built"),
    ],
)
def test_a_wrong_value_says_what_is_wrong(model: dict, params: dict, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        objective(model, **params)


def test_keys_that_are_set_for_you_are_diffusers() -> None:
    assert all(any(key in arguments(name) for name in (UNET, CONDITIONAL, AUTOENCODER)) for key in _OURS)
