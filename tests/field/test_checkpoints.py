"""Reports about checkpoints; tests/field/README.md names them."""

import argparse
import json

import numpy as np
import open_clip
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from tests.evaluate.sets import CONFIG
from tests.field.helpers import index, jpeg, sample, winnow, write_tar


def network():
    torch.manual_seed(5)
    vision = open_clip.model.CLIPVisionCfg(**CONFIG["vision_cfg"])
    text = open_clip.model.CLIPTextCfg(**CONFIG["text_cfg"])
    return open_clip.model.CLIP(CONFIG["embed_dim"], vision, text).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    (folder / "tiny.json").write_text(json.dumps(CONFIG))
    members = [member for i in range(4) for member in sample(str(i), i)]
    write_tar(folder / "shards" / "0.tar", members)
    index(folder / "shards", folder / "pool")
    return folder


def measure(folder, file, name):
    """What the `clip` measure makes of the pool with these weights; the exit status, what was printed, embeddings."""
    out = folder / f"out-{name}"
    spec = f"{folder / 'tiny.json'}:{file}"
    args = ("--measures", "clip", "--scorer", spec, "--out", out, "--executor", "serial")
    status, printed = winnow("measure", folder / "pool", *args)
    if status:
        return status, printed, None
    (values,) = (out / "columns").glob("clip*/*.parquet")
    return status, printed, np.array(pq.read_table(values)["image"].to_pylist(), np.float32)


@pytest.fixture(scope="module")
def expected():
    """The images' embeddings by open_clip alone."""
    import io

    transform = open_clip.image_transform(CONFIG["vision_cfg"]["image_size"], is_train=False)
    images = [transform(Image.open(io.BytesIO(jpeg(i))).convert("RGB")) for i in range(4)]
    with torch.no_grad():
        return network().encode_image(torch.stack(images), normalize=True).numpy()


def renamed(start):
    return {start + name: value for name, value in network().state_dict().items()}


LOADED = {
    "bare": lambda: network().state_dict(),
    "of open_clip's training": lambda: {"epoch": 3, "name": "x", "state_dict": renamed("module."), "optimizer": {}},
    "half": lambda: {name: value.half() for name, value in network().state_dict().items()},
    "bfloat16": lambda: {name: value.bfloat16() for name, value in network().state_dict().items()},
}


@pytest.mark.parametrize("name", LOADED)
def test_weights_as_trainings_save_them(folder, expected, name):
    torch.save(LOADED[name](), folder / "weights.pt")
    status, printed, found = measure(folder, folder / "weights.pt", name)
    assert status == 0, printed
    assert np.abs(found - expected).max() < (0.03 if name == "bfloat16" else 0.004)


def test_safetensors(folder, expected):
    save_file({name: value.contiguous() for name, value in network().state_dict().items()}, folder / "w.safetensors")
    status, printed, found = measure(folder, folder / "w.safetensors", "safetensors")
    assert status == 0, printed
    assert np.abs(found - expected).max() < 0.004


def without(*names):
    return {name: value for name, value in network().state_dict().items() if name not in names}


REFUSED = {
    "weights missing": (lambda: without("visual.proj"), "visual.proj"),
    "more weights": (lambda: without() | {"classifier.weight": torch.ones(3)}, "classifier.weight"),
    "other shape": (lambda: without() | {"text_projection": torch.ones(5, 5)}, "text_projection"),
    "objects": (lambda: {"state_dict": without(), "args": argparse.Namespace(lr=1)}, "more than tensors"),
    "whole module": (network, "more than tensors"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_weights_that_do_not_fit_are_refused_by_name(folder, name):
    make, words = REFUSED[name]
    torch.save(make(), folder / "other.pt")
    status, printed, _ = measure(folder, folder / "other.pt", name)
    assert status == 1 and words in printed


@pytest.mark.parametrize("kind", ["cut", "pointer"])
def test_a_file_that_did_not_arrive_is_no_checkpoint(folder, kind):
    path = folder / f"{kind}.pt"
    torch.save(network().state_dict(), path)
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 10\n"
    path.write_bytes(path.read_bytes()[:2000] if kind == "cut" else pointer)
    status, printed, _ = measure(folder, path, kind)
    assert status == 1 and "cannot be loaded" in printed and "Traceback" not in printed
