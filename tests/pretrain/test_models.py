import numpy as np
import pytest
import timm
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torch import nn

from tests.pretrain.tiny import MODEL, NARROW
from winnow.infra.params import ParameterError, build
from winnow.pretrain.encoder import Encoder
from winnow.pretrain.models.open_clip import build_model
from winnow.pretrain.models.preprocessing import preprocess_config, val_transform
from winnow.pretrain.models.timm import timm_arguments, timm_names
from winnow.pretrain.models.towers import build_image_tower
from winnow.pretrain.sections import ModelConfig


def test_names_and_arguments_are_timms() -> None:
    for family, cls in (("resnet", timm.models.ResNet), ("vision_transformer", timm.models.VisionTransformer)):
        names = {name for name, of in timm_names().items() if of == family}
        assert len(names) > 70 and names <= set(timm.list_models())
        code = cls.__init__.__code__
        assert timm_arguments(family) == set(code.co_varnames[1 : code.co_argcount])


@pytest.mark.parametrize(
    ("model", "dim"),
    [
        ({"timm": "resnet18", "size": 32, "stem": "cifar"}, 512),
        ({"timm": "resnet50", "size": 64}, 2048),
        ({"timm": "resnet26t", "size": 32, "stem": "cifar", "kwargs": {"layers": [1, 1, 1, 1]}}, 2048),
        ({"timm": "resnet18", "size": 64, "kwargs": {"global_pool": "catavgmax"}}, 1024),
        ({"timm": "vit_tiny_patch16_224", "size": 32, "kwargs": {"patch_size": 8, "depth": 2}}, 192),
        (MODEL, 16),
    ],
)
def test_towers_give_pooled_features(model: dict, dim: int) -> None:
    tower = build_image_tower(build(ModelConfig, model, "").resolved() if "timm" in model else model).eval()
    assert tower.dim == dim
    encoder = Encoder("tower", "digest", tower, None, "cpu")
    assert (encoder.dim, encoder.image_size, encoder.has_text) == (dim, model.get("size", 32), False)
    size = model.get("size", 32)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (size, size, 3), dtype=np.uint8))
    pixels = torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy())
    with torch.no_grad():  # training's normalisation on the device is evaluation's preprocessing
        expected = tower.encode_image(val_transform(preprocess_config(tower))(image)[None])
        torch.testing.assert_close(tower(pixels[None]), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("resize", ["shortest", "longest", "squash"])
def test_images_are_preprocessed_together_as_open_clip_does_one_by_one(resize: str) -> None:
    rng = np.random.default_rng(0)
    sizes = [(50, 70), (32, 32), (200, 33), (7, 90), (500, 375)]
    images = [Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)) for size in sizes]
    local = {"mean": [0.1, 0.5, 0.9], "std": [0.2, 0.3, 0.7], "interpolation": "bilinear", "resize_mode": resize}
    model = build_model(MODEL, local)
    encoder = Encoder("model", "digest", model, None, "cpu")
    reference = torch.stack(
        [image_transform_v2(PreprocessCfg(**model.visual.preprocess_cfg), False)(i) for i in images]
    )
    crops = torch.stack([encoder.crop(image) for image in images])
    assert crops.dtype == torch.uint8
    assert torch.equal(encoder.normalise(crops), reference)
    assert torch.equal(torch.stack([encoder.preprocess(image) for image in images]), reference)


def test_weights_are_those_timm_would_draw() -> None:
    torch.manual_seed(3)
    ours = build_image_tower(ModelConfig(timm="resnet18", size=64).resolved()).trunk
    torch.manual_seed(3)
    reference = timm.create_model("resnet18", num_classes=0)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), reference.parameters(), strict=True))
    cfg = preprocess_config(build_image_tower(ModelConfig(timm="resnet18", size=64).resolved()))
    assert cfg["mean"] == list(timm.data.IMAGENET_DEFAULT_MEAN) and cfg["size"] == [64, 64]


def test_cifar_stem_keeps_the_resolution() -> None:
    trunk = build_image_tower(build(ModelConfig, NARROW, "").resolved()).trunk
    assert (trunk.conv1.kernel_size, trunk.conv1.stride) == ((3, 3), (1, 1))
    assert not any(isinstance(module, nn.MaxPool2d) for module in trunk.modules())
    assert trunk.forward_features(torch.zeros(1, 3, 32, 32)).shape == (1, 16, 4, 4)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ({"timm": "resnet81"}, 'unknown timm ResNet or ViT "resnet81". Did you mean "resnet'),
        ({"timm": "resnet18", "kwargs": {"layrs": [1]}}, 'Did you mean "layers"'),
        ({"timm": "resnet18", "kwargs": {"num_classes": 10}}, "must leave num_classes alone"),
        ({"timm": "resnet18", "kwargs": {"global_pool": ""}}, "must not switch off global_pool"),
        ({"timm": "vit_tiny_patch16_224", "stem": "cifar"}, "stem cifar is of ResNets"),
        ({"name": "ViT-B-32", "timm": "resnet18"}, "give one of"),
        ({"name": "ViT-B-32", "size": 32}, "size can be set for a timm network only"),
    ],
)
def test_a_wrong_model_says_what_is_wrong(model: dict, words: str) -> None:
    with pytest.raises(ParameterError) as error:
        build(ModelConfig, model, "").resolved()
    assert words in str(error.value)
