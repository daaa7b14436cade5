"""Files of weights as trainers leave them, and what a config in a file may ask for."""

import json
import resource
import zipfile
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from safetensors.torch import save_file

from tests.pretrain.tiny import MODEL
from winnow.infra.errors import UsageError, WinnowError
from winnow.pretrain.encoder import encoder_digest, load_encoder
from winnow.pretrain.models.open_clip import agreed_preprocess, build_model
from winnow.pretrain.models.tokenizer import build_tokenizer

IMAGES = np.random.default_rng(0).standard_normal((2, 3, 32, 32)).astype(np.float32)


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(3)
    return build_model(MODEL).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, network):
    folder = tmp_path_factory.mktemp("weights")
    (folder / "tiny.json").write_text(json.dumps(MODEL))
    return folder


def renamed(state, start):
    return {start + name: value for name, value in state.items()}


def within(state, name):
    return {key.replace("visual.", f"visual.{name}."): value for key, value in state.items()}


NUMBERS = {"input_resolution": torch.tensor(32), "context_length": torch.tensor(24), "vocab_size": torch.tensor(49408)}
LOADED = {
    "DataParallel": lambda s: {"epoch": 3, "state_dict": renamed(s, "module."), "optimizer": {}},
    "compiled": lambda s: {"state_dict": renamed(s, "_orig_mod.")},
    "DataParallel of compiled": lambda s: {"state_dict": renamed(s, "module._orig_mod.")},
    "compiled DataParallel": lambda s: renamed(s, "_orig_mod.module."),
    "compiled image tower": lambda s: within(s, "_orig_mod"),
    "FSDP": lambda s: within(s, "_fsdp_wrapped_module"),
    "Lightning": lambda s: {"state_dict": renamed(s, "model."), "callbacks": {}, "global_step": 4},
    "timm's average": lambda s: {"epoch": 1, "state_dict_ema": s},
    "key model": lambda s: {"model": s, "args": {"lr": 0.1}},
    "DeepSpeed": lambda s: {"module": renamed(s, "module."), "dp_world_size": 1},
    "half": lambda s: {name: value.half() for name, value in s.items()},
    "OpenAI's": lambda s: s | NUMBERS,
    "parameters": lambda s: {name: torch.nn.Parameter(value) for name, value in s.items()},
}


@pytest.mark.parametrize("name", LOADED)
def test_what_trainers_wrap_around_weights_is_taken_off(name, folder, network):
    torch.save(LOADED[name](network.state_dict()), folder / "w.pt")
    found = load_encoder(f"{folder}/tiny.json:{folder}/w.pt", device="cpu").encode_images(IMAGES)
    with torch.no_grad():
        expected = network.encode_image(torch.from_numpy(IMAGES), normalize=True).numpy()
    np.testing.assert_allclose(found, expected, atol=2e-3 if name == "half" else 1e-6)


def larger(**sizes):
    vision = MODEL["vision_cfg"] | {key: sizes[key] for key in ("image_size",) if key in sizes}
    text = MODEL["text_cfg"] | {key: sizes[key] for key in ("context_length",) if key in sizes}
    return build_model({**MODEL, "vision_cfg": vision, "text_cfg": text}).state_dict()


def script(path):
    torch.jit.save(torch.jit.script(torch.nn.ReLU()), path)


def bomb(path):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}q\0.")
        archive.writestr("archive/data/0", bytes(50_000_000))


REFUSED = {
    "list": (lambda s: [1, 2], "is no state dict .*it holds a list"),
    "optimizer alone": (lambda s: {"optimizer": {"state": {}}, "epoch": 3}, "is no state dict .*optimizer, epoch"),
    "nothing": (lambda s: {}, "it holds nothing"),
    "bare module's values": (lambda s: s | {"epoch": 3}, "not tensors: epoch"),
    "another prefix": (lambda s: renamed(s, "clip."), "none of the model's names; it has clip.positional_embedding"),
    "image tower alone": (
        lambda s: {k: v for k, v in s.items() if "visual" in k},
        "lacks positional_embedding, .* more",
    ),
    "another network": (lambda s: s | {"head.weight": torch.ones(3)}, "has head.weight that the model has not"),
    "SigLIP": (lambda s: s | {"logit_bias": torch.tensor(-10.0)}, "logit_bias: weights of SigLIP.*init_logit_bias"),
    "larger images": (lambda s: larger(image_size=64), r"another image size: .*\[17, 32\].*\[5, 32\].*interpolated"),
    "longer texts": (lambda s: larger(context_length=50), r"another context length: .*\[50, .*interpolated"),
    "narrower": (lambda s: s | {"text_projection": torch.ones(5, 5)}, r"1 weights of other shapes: text_projection"),
    "TorchScript": (script, "is a TorchScript archive, which is code"),
    "zip bomb": (bomb, "more than four times its size"),
    "LFS": (
        lambda path: path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:a\n"),
        "Git LFS pointer",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_weights_that_cannot_be_used_are_named_for_what_they_are(name, folder, network):
    make, words = REFUSED[name]
    path = folder / "refused.pt"
    if name in ("TorchScript", "zip bomb", "LFS"):
        make(path)
    else:
        torch.save(make(network.state_dict()), path)
    with pytest.raises(WinnowError, match=words) as caught:
        load_encoder(f"{folder}/tiny.json:{path}", device="cpu")
    assert len(str(caught.value)) < 700 and "\n" not in str(caught.value)


@pytest.mark.parametrize("weights", ["open_clip_pytorch_model.bin", "pytorch_model.bin", "model.pth", "x.safetensors"])
def test_a_folder_of_open_clips_layout(weights, tmp_path, network):
    """Its weights count for its identity, whatever they are called."""
    content = {"model_cfg": MODEL, "preprocess_cfg": {"mean": [0.5, 0.5, 0.5]}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(content))
    state = {f"_orig_mod.{name}": value.contiguous() for name, value in network.state_dict().items()}
    save_file(state, tmp_path / weights) if weights.endswith("safetensors") else torch.save(state, tmp_path / weights)
    encoder = load_encoder(str(tmp_path), device="cpu")
    with torch.no_grad():
        expected = network.encode_image(torch.from_numpy(IMAGES), normalize=True).numpy()
    np.testing.assert_allclose(encoder.encode_images(IMAGES), expected, atol=1e-6)
    assert torch.equal(
        encoder.preprocess(Image.new("RGB", (40, 40)))[:, 0, 0],
        -torch.ones(3) * 0.5 / torch.tensor([0.26862954, 0.26130258, 0.27577711]),
    )
    before = encoder.digest
    larger_images = {name: value.contiguous() for name, value in larger(image_size=64).items()}
    if weights.endswith("safetensors"):
        save_file(larger_images, tmp_path / weights)
    else:
        torch.save(larger_images, tmp_path / weights)
    assert encoder_digest(str(tmp_path)) != before
    with pytest.raises(WinnowError, match="another image size"):
        load_encoder(str(tmp_path), device="cpu")


def test_a_file_is_preprocessed_as_all_published_weights_of_its_model():
    """By open_clip's own table: what its tags agree on, and elsewhere its default, as before."""
    default = vars(PreprocessCfg())
    for name in open_clip.list_models():
        tags = [open_clip.get_pretrained_cfg(name, tag) for tag in open_clip.list_pretrained_tags_by_model(name)]
        found = {**default, **agreed_preprocess(name)}
        for key in ("mean", "std", "interpolation", "resize_mode"):
            values = [tuple(tag[key]) if isinstance(tag[key], tuple) else tag[key] for tag in tags]
            expected = values[0] if values and values.count(values[0]) == len(values) else default[key]
            assert (tuple(found[key]) if key in ("mean", "std") else found[key]) == expected, (name, key)
    assert agreed_preprocess("PE-Core-T-16-384")["resize_mode"] == "squash"
    assert agreed_preprocess("ViT-B-32") == agreed_preprocess("ViT-L-14") == {}


@pytest.mark.parametrize("second", ["squash", "longest"])
def test_local_weights_of_a_published_model_get_its_preprocessing(second, tmp_path, network, monkeypatch):
    """A tiny model in open_clip's tables, with two sets of published weights that agree or not on how to resize."""
    half = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bilinear"}
    tags = {"a": half | {"resize_mode": "squash"}, "b": half | {"resize_mode": second}}
    name = f"Tiny-{second}"
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, name, tags)
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, name, MODEL)
    torch.save(network.state_dict(), tmp_path / "w.pt")
    encoder = load_encoder(f"{name}:{tmp_path}/w.pt", device="cpu")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 90, 3), dtype=np.uint8))
    mode = "squash" if second == "squash" else "shortest"
    expected = image_transform_v2(PreprocessCfg(size=32, resize_mode=mode, **half), is_train=False)(image)
    assert torch.equal(encoder.preprocess(image), expected)


def changed(**sections):
    """The config with other values in its sections."""
    return {key: value | sections.get(key, {}) if isinstance(value, dict) else value for key, value in MODEL.items()}


NAMES = [
    (changed(vision_cfg={"timm_model_name": "hf-hub:someone/net"}), "a network that timm does not have"),
    (changed(vision_cfg={"timm_model_name": "local-dir:/tmp/net"}), "a network that timm does not have"),
    (changed(text_cfg={"hf_model_name": "someone/net"}), "hf_model_name 'someone/net'"),
    (changed(text_cfg={"hf_tokenizer_name": "someone/net"}), "hf_tokenizer_name 'someone/net'"),
    (changed(text_cfg={"tokenizer_kwargs": {"trust_remote_code": True}}), 'tokenizer_kwargs "trust_remote_code"'),
    (changed(text_cfg={"tokenizer_kwargs": {"bpe_path": "/etc/passwd"}}), 'tokenizer_kwargs "bpe_path"'),
]


@pytest.fixture
def no_network(monkeypatch):
    import socket

    def refuse(*args):
        raise AssertionError("a connection was asked for")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.mark.parametrize(("model", "words"), NAMES)
@pytest.mark.parametrize("form", ["config", "open_clip folder", "winnow folder"])
def test_names_in_a_config_reach_no_network(form, model, words, tmp_path, network, no_network):
    save_file(network.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": model, "preprocess_cfg": {}}))
    spec = str(tmp_path)
    if form == "config":
        spec = f"{tmp_path}/open_clip_config.json:{tmp_path}/model.safetensors"
    elif form == "winnow folder":
        content = {"objective": {"name": "clip", "params": {}}, "model": model, "preprocess": {}}
        (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(UsageError, match=words):
        load_encoder(spec, device="cpu")


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ({"timm": "hf-hub:someone/net", "size": 32, "stem": "imagenet", "kwargs": {}}, "unknown timm"),
        ({"timm": "resnet18", "size": 32, "stem": "imagenet", "kwargs": {"pretrained": True}}, 'resnet18 "pretrained"'),
    ],
)
def test_a_checkpoints_timm_network_is_a_registered_one(model, words, tmp_path, network, no_network):
    save_file(network.state_dict(), tmp_path / "model.safetensors")
    content = {"objective": {"name": "simclr", "params": {}}, "model": model, "preprocess": None}
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(UsageError, match=words):
        load_encoder(str(tmp_path), device="cpu")


def test_the_tokenizers_of_open_clips_own_models_are_allowed():
    for name in open_clip.list_models():
        config = open_clip.get_model_config(name)
        tower = {"vision_cfg": MODEL["vision_cfg"], "embed_dim": 16, "text_cfg": MODEL["text_cfg"]}
        kwargs = config["text_cfg"].get("tokenizer_kwargs") or {}
        if not config["text_cfg"].get("hf_tokenizer_name"):
            build_tokenizer({**tower, "text_cfg": tower["text_cfg"] | {"tokenizer_kwargs": kwargs}})
        from winnow.pretrain.models.open_clip import check_config

        check_config(config)


BOMBS = {
    "width": changed(vision_cfg={"width": 1 << 15, "head_width": 64, "layers": 100}),
    "vocabulary": changed(text_cfg={"vocab_size": 1 << 30}),
    "layers": changed(text_cfg={"layers": 10**9}),
    "image": changed(vision_cfg={"image_size": 1 << 16, "patch_size": 1 << 16}),
}


@pytest.fixture
def one_gigabyte():
    """The process may take one GB more than it has."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.parametrize("name", BOMBS)
def test_a_config_cannot_ask_for_any_amount_of_memory(name, tmp_path, network, one_gigabyte):
    torch.save(network.state_dict(), tmp_path / "w.pt")
    (tmp_path / "c.json").write_text(json.dumps(BOMBS[name]))
    with pytest.raises(WinnowError, match="10,000 layers" if name == "layers" else "weights, more than its file"):
        load_encoder(f"{tmp_path}/c.json:{tmp_path}/w.pt", device="cpu")


@pytest.mark.parametrize(
    ("content", "words"),
    [("[" * 100_000 + "]" * 100_000, "nested too deeply"), (json.dumps(MODEL) + " " * (17 << 20), "more than 16 MB")],
)
def test_a_config_is_small_and_flat(content, words, tmp_path, one_gigabyte):
    (tmp_path / "c.json").write_text(content)
    with pytest.raises(WinnowError, match=words):
        load_encoder(f"{tmp_path}/c.json:random", device="cpu")


def lying(path):
    header = json.dumps({"a": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header)


def long(path):
    path.write_bytes((1 << 62).to_bytes(8, "little") + b"{}")


@pytest.mark.parametrize(
    ("name", "make", "words"),
    [
        ("w.safetensors", lying, "cannot be loaded"),
        ("w.safetensors", long, "is not a safetensors file"),
        ("w.npz", bomb, "more than four times its size"),
    ],
)
def test_a_header_cannot_ask_for_any_amount_of_memory(name, make, words, folder, tmp_path, one_gigabyte):
    make(tmp_path / name)
    with pytest.raises(WinnowError, match=words):
        load_encoder(f"{folder}/tiny.json:{tmp_path / name}", device="cpu")
