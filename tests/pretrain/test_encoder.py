import json
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from tests.pretrain.tiny import CASES, MODEL, config
from winnow.infra.errors import UsageError, WinnowError
from winnow.pretrain.encoder import Encoder, encoder_digest, load_checkpoint, load_encoder, load_encoders
from winnow.pretrain.loop import make_objective
from winnow.pretrain.models.open_clip import build_model
from winnow.pretrain.models.tokenizer import build_tokenizer
from winnow.pretrain.models.towers import build_image_tower

OLD_CONFIG = """{"format": 1,
"objective": {"name": "moco", "params": {"queue": 32, "bn_parts": 2, "momentum": 0.9, "dim": 16}},
"model": {"timm": "resnet18", "size": 32, "stem": "cifar",
 "kwargs": {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16]}},
"preprocess": {"size": [32, 32], "mode": "RGB", "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225],
 "interpolation": "bilinear", "resize_mode": "shortest", "fill_color": 0},
"training": {"config": {"objective": {"moco": {"queue": 32, "bn_parts": 2, "momentum": 0.9, "dim": 16}},
 "model": {"timm": "resnet18", "size": 32, "stem": "cifar",
  "kwargs": {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16]}},
 "samples_seen": 48, "batch_size": 8, "lr": 0.01, "warmup": 2, "schedule": "cosine", "optimizer": "adamw",
 "weight_decay": 0.2, "beta1": 0.9, "beta2": 0.98, "eps": 1e-06, "momentum": 0.9, "grad_clip": null, "ema": null,
 "precision": "auto", "augment": null, "deepspeed": {}},
 "seed": 0, "steps": 6, "samples_seen": 48, "samples": 40, "replaced": 0, "losses": {}}}"""
TEXTS = ["a diagram", "a dog", "a cat"]


@pytest.fixture
def image() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 70, 3), dtype=np.uint8))


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, torch.nn.Module]:
    """A model's config, and its weights in a state dict and in safetensors."""
    torch.manual_seed(7)
    model = build_model(MODEL).eval()
    (tmp_path / "tiny.json").write_text(json.dumps(MODEL))
    torch.save({"state_dict": model.state_dict()}, tmp_path / "weights.pt")
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    return tmp_path, model


@pytest.mark.parametrize("file", ["weights.pt", "weights.safetensors"])
def test_a_config_and_a_file_give_open_clips_embeddings(
    file: str, saved: tuple[Path, torch.nn.Module], image: Image.Image
) -> None:
    folder, model = saved
    encoder = load_encoder(f"{folder}/tiny.json:{folder}/{file}", device="cpu")
    pixels = encoder.preprocess(image)
    with torch.no_grad():
        images = model.encode_image(pixels[None], normalize=True).numpy()
        texts = model.encode_text(build_tokenizer(MODEL)(TEXTS), normalize=True).numpy()
    np.testing.assert_allclose(encoder.encode_images(pixels[None]), images, atol=1e-6)
    np.testing.assert_allclose(encoder.encode_texts(TEXTS, batch=2), texts, atol=1e-6)
    assert (encoder.dim, encoder.image_size, encoder.has_text) == (16, 32, True)
    assert encoder.logit_scale == pytest.approx(1 / 0.07)
    assert encoder.encode_texts([]).shape == (0, 16)


def test_a_published_model_with_a_local_file(tmp_path: Path, image: Image.Image) -> None:
    name = min(open_clip.list_models(), key=lambda n: 0 if n == "ViT-S-32-alt" else 1)
    model, _, preprocess = open_clip.create_model_and_transforms(name)
    torch.save(model.state_dict(), tmp_path / "w.pt")
    encoder = load_encoder(f"{name}:{tmp_path}/w.pt", device="cpu")
    pixels = preprocess(image)
    torch.testing.assert_close(encoder.preprocess(image), pixels)
    with torch.no_grad():
        images = model.eval().encode_image(pixels[None], normalize=True).numpy()
        texts = model.encode_text(open_clip.get_tokenizer(name)(TEXTS), normalize=True).numpy()
    np.testing.assert_allclose(encoder.encode_images(pixels[None]), images, atol=1e-5)
    np.testing.assert_allclose(encoder.encode_texts(TEXTS), texts, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(encoder.encode_texts(TEXTS), axis=1), 1, atol=1e-6)


def test_random_weights_are_the_same_each_time(saved: tuple[Path, torch.nn.Module]) -> None:
    spec = f"{saved[0]}/tiny.json:random"
    first = load_encoder(spec, device="cpu")
    assert load_encoder(spec, device="cpu") is first
    assert encoder_digest(f"{saved[0]}/tiny.json:") == first.digest
    x = np.zeros((2, 3, 32, 32), np.float32)
    for i in range(3):  # push it out of the cache
        torch.save(build_model(MODEL).state_dict(), saved[0] / f"{i}.pt")
        load_encoder(f"{saved[0]}/tiny.json:{saved[0]}/{i}.pt", device="cpu")
    again = load_encoder(spec, device="cpu")
    assert again is not first
    np.testing.assert_array_equal(again.encode_images(x), first.encode_images(x))


def test_preprocess_key_follows_the_preprocessing(saved: tuple[Path, torch.nn.Module]) -> None:
    folder, _ = saved
    mean = {"model_cfg": MODEL, "preprocess_cfg": {"mean": [0.5, 0.5, 0.5]}}
    (folder / "mean.json").write_text(json.dumps(mean))
    a, b, c = (
        load_encoder(f"{folder}/{name}:{weights}", device="cpu")
        for name, weights in (("tiny.json", "random"), ("tiny.json", folder / "weights.pt"), ("mean.json", "random"))
    )
    assert a.preprocess_key == b.preprocess_key != c.preprocess_key


def test_digest_is_of_the_content(saved: tuple[Path, torch.nn.Module]) -> None:
    folder, _ = saved
    spec = f"{folder}/tiny.json:{folder}/weights.pt"
    before = encoder_digest(spec)
    (folder / "copy.pt").write_bytes((folder / "weights.pt").read_bytes())
    assert encoder_digest(f"{folder}/tiny.json:{folder}/copy.pt") == before
    assert encoder_digest("ViT-B-32:openai") != encoder_digest("ViT-B-16:openai")
    torch.save(build_model(MODEL).state_dict(), folder / "weights.pt")
    assert encoder_digest(spec) != before


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("ViT-B-23:openai", 'Did you mean "ViT-B-32"'),
        ("ViT-B-32:opnai", 'Did you mean "ViT-B-32:openai"'),
        ("ViT-B-32", "says no weights"),
        ("ViT-B-32:./w.pt", "no such file of weights"),
        ("runs/none", "no such checkpoint folder"),
        ("none.json:w.pt", "no such model config"),
        ("", "is empty"),
        ("pixels:0", "pixels:SIZE"),
        ("/no/such/place:w.pt", "no such checkpoint"),
        (__file__, "is a file, .*CONFIG.json:WEIGHTS"),
        ("ViT-B-32:/", "is a folder"),
    ],
)
def test_a_wrong_spec_says_what_is_wrong(spec: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        encoder_digest(spec)


@pytest.mark.parametrize(
    ("preprocess", "words"),
    [({"mena": [0, 0, 0]}, 'Did you mean "mean"'), ({"mean": 0.5}, "three numbers"), ([], "should be an object")],
)
def test_what_open_clip_would_ignore_in_a_config_is_refused(saved: tuple, preprocess: object, words: str) -> None:
    path = saved[0] / "typo.json"
    path.write_text(json.dumps({"model_cfg": MODEL, "preprocess_cfg": preprocess}))
    with pytest.raises(UsageError, match=words) as caught:
        encoder_digest(f"{path}:random")
    assert caught.value.where == str(path)


def test_a_config_that_cannot_be_built_is_named(saved: tuple) -> None:
    path = saved[0] / "wrong.json"
    path.write_text(json.dumps(MODEL | {"text_cfg": {"wdith": 16}}))
    with pytest.raises(UsageError, match=r"wrong\.json: open_clip cannot build the model"):
        load_encoder(f"{path}:random")


def test_texts_of_any_length_in_any_order(saved: tuple) -> None:
    """Texts of like length are embedded together: each as it would be alone, in the order they were given."""
    folder, model = saved
    encoder = load_encoder(f"{folder}/tiny.json:{folder}/weights.pt", device="cpu")
    rng = np.random.default_rng(0)
    texts = [" ".join(["word", "dog", "a"][k] for k in rng.integers(3, size=rng.integers(0, 30))) for _ in range(50)]
    tokens = build_tokenizer(MODEL)(texts)
    with torch.no_grad():
        expected = torch.cat([model.encode_text(row[None], normalize=True) for row in tokens]).numpy()
    for batch in (1, 7, 256):
        np.testing.assert_allclose(encoder.encode_texts(texts, batch=batch), expected, atol=1e-6)


def test_a_folder_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    for spec in (str(tmp_path), f"{tmp_path}:random"):
        with pytest.raises(UsageError, match="holds no checkpoint"):
            encoder_digest(spec)


def test_a_checkpoints_networks_with_weights_drawn_anew(tmp_path: Path) -> None:
    """Equal for checkpoints of the same networks, whatever they learnt."""
    for number, seed in enumerate((0, 1)):
        made = config(**CASES["simclr"])
        torch.manual_seed(seed)
        trained = build_image_tower(made.model.resolved())
        folder = tmp_path / str(number)
        folder.mkdir()
        save_file(trained.state_dict(), folder / "model.safetensors")
        content = {
            "objective": {"name": "simclr", "params": {}},
            "model": made.model.resolved(),
            "preprocess": trained.preprocess_cfg,
        }
        (folder / "config.json").write_text(json.dumps(content))
    x = np.random.default_rng(0).random((2, 3, 32, 32), np.float32)
    first, second = (load_encoder(f"{tmp_path}/{number}:random", device="cpu") for number in (0, 1))
    np.testing.assert_array_equal(first.encode_images(x), second.encode_images(x))
    assert first.digest == second.digest != encoder_digest(str(tmp_path / "0"))
    trained_features = load_encoder(str(tmp_path / "1"), device="cpu").encode_images(x)
    assert np.abs(first.encode_images(x) - trained_features).max() > 1e-3
    with pytest.raises(UsageError, match="is not a checkpoint folder"):
        load_checkpoint(f"{tmp_path}/0:random")


def test_a_checkpoint_of_before_the_sections_loads(tmp_path: Path, image: Image.Image) -> None:
    """Its config.json has the flat names of then, word for word as a training at commit 2a7dc78 wrote it."""
    torch.manual_seed(0)
    tower = build_image_tower(config(**CASES["moco"]).model.resolved())
    save_file(tower.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(OLD_CONFIG)
    encoder = load_encoder(str(tmp_path), device="cpu")
    pixels = encoder.preprocess(image)[None]
    with torch.no_grad():
        expected = torch.nn.functional.normalize(tower.eval().encode_image(pixels), dim=1)
    np.testing.assert_allclose(encoder.encode_images(pixels), expected, atol=1e-6)
    training = json.loads(OLD_CONFIG)["training"]["config"]
    assert training == config(**CASES["moco"]).identity()


@pytest.mark.parametrize("name", ["clip", "simclr", "diffusion", "autoencoder"])
def test_feature_maps_are_what_is_pooled(name: str, tmp_path: Path) -> None:
    """Their mean, or for CLIP and the autoencoder what is made of them, is the embedding."""
    objective = make_objective(config(**CASES[name]), seed=0)
    net: Any = objective.encoder().eval()
    encoder = Encoder("net", "digest", net, None, "cpu")
    side = encoder.image_size
    images = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    maps = torch.from_numpy(encoder.feature_maps(images))
    if name == "clip":  # patches of 16 of 32 pixels, without the class token
        assert maps.shape == (2, 32, 2, 2)
        net.visual.output_tokens = True
        tokens = net.visual(images)[1]
        torch.testing.assert_close(net.visual.ln_post(maps.flatten(2).transpose(1, 2)), tokens.detach())
        return
    pooled = maps.flatten(1) if name == "autoencoder" else maps.mean((2, 3))
    expected = torch.nn.functional.normalize(pooled, dim=1).numpy()
    np.testing.assert_allclose(encoder.encode_images(images), expected, rtol=1e-4, atol=1e-5)


def test_pixels_have_no_feature_maps() -> None:
    encoder = load_encoder("pixels:8", device="cpu")
    with pytest.raises(UsageError, match="has no feature maps"):
        encoder.feature_maps(np.zeros((1, 3, 8, 8), np.float32))


def test_several_encoders_are_kept_until_others_are_wanted(saved: tuple[Path, torch.nn.Module]) -> None:
    folder, _ = saved
    (folder / "damaged.pt").write_bytes(b"?")
    specs = ["pixels:5", "pixels:6", "pixels:7", f"{folder}/tiny.json:{folder}/damaged.pt"]
    wanted = [(spec, encoder_digest(spec)) for spec in specs]
    first = load_encoders(wanted, "cpu")
    assert [type(item).__name__ for item in first] == ["Encoder"] * 3 + ["WinnowError"]
    again = load_encoders(wanted[:2], "cpu")
    assert again[0] is first[0] and again[1] is first[1]
    assert load_encoders(wanted[:3], "cpu")[2] is not first[2]
    with pytest.raises(UsageError, match="no such checkpoint folder"):
        load_encoders([("nowhere", "digest")], "cpu")


def test_pixels_are_their_own_features(image: Image.Image) -> None:
    encoder = load_encoder("pixels:20", device="cpu")
    assert (encoder.dim, encoder.image_size, encoder.has_text) == (1200, 20, False)
    pixels = encoder.preprocess(image)
    # The shorter side becomes 20 pixels, and the middle of the longer one stays.
    small = np.asarray(image.resize((28, 20), Image.Resampling.BICUBIC))[:, 4:24]
    flat = small.transpose(2, 0, 1).reshape(1, -1) / 255
    np.testing.assert_allclose(encoder.encode_images(pixels[None]), flat / np.linalg.norm(flat), atol=1e-6)
    assert encoder_digest("pixels:20") != encoder_digest("pixels:21")
    with pytest.raises(UsageError):
        encoder_digest("pixels:0")


def test_weights_are_never_executed(saved: tuple[Path, torch.nn.Module]) -> None:
    folder, _ = saved

    class Evil:
        def __reduce__(self) -> tuple:
            return Path.touch, (folder / "executed",)

    torch.save({"state_dict": Evil()}, folder / "evil.pt")
    (folder / "garbage.safetensors").write_bytes(b"x" * 100)
    for name in ("evil.pt", "garbage.safetensors"):
        with pytest.raises(WinnowError, match="cannot be loaded") as caught:
            load_encoder(f"{folder}/tiny.json:{folder}/{name}", device="cpu")
        assert "weights_only" not in caught.value.what  # torch's advice is to execute it
    assert not (folder / "executed").exists()
