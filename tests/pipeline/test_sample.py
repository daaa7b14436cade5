"""From images with labels to a grid of samples, by the commands a user types."""

import io
import sys

import numpy as np
import pytest
import yaml
from PIL import Image

from tests.drawing import draw_image, write_tar
from tests.pretrain.tiny import UNET
from winnow.pipeline.cli import main


@pytest.fixture
def winnow(monkeypatch, capsys):
    def call(*args):
        """What a command prints."""
        monkeypatch.setattr(sys, "argv", ["winnow", *map(str, args)])
        with pytest.raises(SystemExit) as stop:
            main()
        printed = capsys.readouterr()
        assert not stop.value.code, printed.err
        return printed.out

    return call


def test_a_class_conditional_model_is_trained_and_drawn_from(winnow, tmp_path):
    members = [{"jpg": draw_image((90 * (i % 3), 9, 9), i), "cls": str(i % 3).encode()} for i in range(12)]
    write_tar(tmp_path / "shards" / "0.tar", [{"key": f"s{i}", "members": local} for i, local in enumerate(members)])
    settings = {
        "objective": {"diffusion": {"classes": ["black", "maroon", "red"], "timesteps": 10, "feature_timestep": 1}},
        "model": UNET,
        "samples_seen": 16,
        "batch_size": 8,
        "warmup_steps": 1,
        "parallel": {"device": "cpu"},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    pool, out = tmp_path / "pool", tmp_path / "run"
    winnow("index", tmp_path / "shards", "--no-captions", "--out", pool, "--executor", "serial")
    winnow("pretrain", pool, "--config", tmp_path / "config.yaml", "--out", out, "--executor", "serial")
    checkpoint = out / "model" / "seed-0"
    assert (checkpoint / "samples.png").exists()

    grid = tmp_path / "grid.png"
    asked = ("sample", checkpoint, "--out", grid, "--n", 6, "--steps", 3, "--guidance", 2, "--classes", "red,black")
    printed = winnow(*asked, "--against", pool, "--features", checkpoint)
    assert printed.startswith("6 samples: ")
    assert f"Fréchet distance of 6 samples from 12 images, over {checkpoint}: " in printed
    pixels = np.asarray(Image.open(io.BytesIO(grid.read_bytes())))
    assert pixels.shape == (2 * 10 + 2, 3 * 10 + 2, 3)
    first = grid.read_bytes()
    winnow(*asked)
    assert grid.read_bytes() == first
    winnow(*asked, "--seed", 1)
    assert grid.read_bytes() != first
