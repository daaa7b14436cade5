import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from PIL import Image
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms.functional import resized_crop

from tests.pretrain.halves import features, gradients, one_of_two
from tests.pretrain.tiny import MODEL, config
from winnow.pretrain.data.augment import random_resized_crop
from winnow.pretrain.engine.optimizers import learning_rate
from winnow.pretrain.loop import make_objective
from winnow.pretrain.models.open_clip import build_model
from winnow.pretrain.models.preprocessing import preprocess_config, val_transform
from winnow.pretrain.objectives.base import Sample
from winnow.pretrain.objectives.contrastive.clip import clip_loss


def test_loss_is_figure_3_of_the_paper() -> None:
    rng = np.random.default_rng(0)
    image, text = rng.normal(size=(2, 8, 5))
    image /= np.linalg.norm(image, axis=1, keepdims=True)
    text /= np.linalg.norm(text, axis=1, keepdims=True)
    t = 1.7
    logits = image @ text.T * np.exp(t)

    def cross_entropy(rows: np.ndarray) -> float:
        return float(np.mean([math.log(np.exp(row).sum()) - row[i] for i, row in enumerate(rows)]))

    expected = (cross_entropy(logits) + cross_entropy(logits.T)) / 2
    loss, accuracy = clip_loss(
        torch.from_numpy(image), torch.from_numpy(text), torch.tensor(math.exp(t), dtype=torch.float64)
    )
    assert float(loss) == pytest.approx(expected, abs=1e-12)
    assert float(accuracy) == pytest.approx(np.mean(logits.argmax(1) == np.arange(8)))


def test_two_processes_have_the_gradient_of_the_whole_batch(tmp_path: Path) -> None:
    mp.spawn(one_of_two, args=(str(tmp_path),), nprocs=2)
    expected = gradients(*features())
    for rank in range(2):
        for got, want in zip(torch.load(tmp_path / f"{rank}.pt", weights_only=True), expected, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    assert expected[-1].abs() > 1e-6


def test_the_whole_image_is_seen_as_in_evaluation() -> None:
    """A crop of everything, normalised in the forward pass, is open_clip's preprocessing for evaluation."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    objective = make_objective(config(augment=(1.0, 1.0)), seed=0)

    class NoRatio:
        def __init__(self) -> None:
            self.draws = iter([1.0, 0.0])

        def uniform(self, low: float, high: float) -> float:
            return next(self.draws)

        def integers(self, high: int) -> int:
            return 0

    pixels = random_resized_crop(image, 32, (1.0, 1.0), NoRatio())  # type: ignore[arg-type]
    normalised = (torch.from_numpy(pixels).float() / 255 - objective.mean[0]) / objective.std[0]
    expected = val_transform(preprocess_config(build_model(MODEL)))(image)
    torch.testing.assert_close(normalised, expected)


def test_crops_have_torchvisions_law() -> None:
    """The same distribution of crop sizes as torchvision draws, and its pixels for a given box."""
    ramp = np.stack(np.meshgrid(np.arange(60), np.arange(90)), -1)
    image = Image.fromarray(np.concatenate([ramp, ramp[..., :1]], -1).astype(np.uint8))
    ours = []
    for i in range(400):
        crop = random_resized_crop(image, 64, (0.3, 0.9), np.random.default_rng(i)).astype(float)
        ours.append([np.ptp(crop[0]), np.ptp(crop[1])])
    torch.manual_seed(0)
    reference = [RandomResizedCrop.get_params(image, [0.3, 0.9], [3 / 4, 4 / 3])[2:] for _ in range(400)]
    mean = np.mean(ours, 0) + 1
    assert mean == pytest.approx(np.mean(reference, 0)[::-1], rel=0.05)

    tall = Image.fromarray(np.random.default_rng(0).integers(0, 255, (200, 20, 3), dtype=np.uint8))
    fallback = random_resized_crop(tall, 16, (0.9, 1.0), np.random.default_rng(0))
    height = round(20 * 4 / 3)
    expected = resized_crop(tall, (200 - height) // 2, 0, height, 20, [16, 16], InterpolationMode.BICUBIC)
    np.testing.assert_array_equal(fallback, np.asarray(expected).transpose(2, 0, 1))


def test_views_depend_on_the_generator_alone() -> None:
    objective = make_objective(config(augment=(0.3, 1.0)), seed=0)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 64, 3), dtype=np.uint8))
    first, again, other = (
        objective.views(Sample(image=image, text="a cat"), np.random.default_rng(seed))["image"] for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    assert first.dtype == np.uint8 and first.shape == (3, 32, 32)


def test_networks_are_drawn_from_the_seed() -> None:
    one, again, other = (make_objective(config(), seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not torch.equal(one["net.token_embedding.weight"], other["net.token_embedding.weight"])


def test_weight_decay_spares_gains_biases_and_the_scale() -> None:
    objective = make_objective(config(), seed=0)
    decayed = {name for name, parameter in objective.named_parameters() if objective.decays(name, parameter)}
    assert "net.visual.conv1.weight" in decayed and "net.text_projection" in decayed
    spared = {name for name, _ in objective.named_parameters()} - decayed
    assert all("ln" in name or "bias" in name or "logit_scale" in name or "class_embedding" in name for name in spared)
    assert "net.logit_scale" in spared


def test_logit_scale_is_kept_between_1_and_its_maximum() -> None:
    objective = make_objective(config(), seed=0)
    for value, kept in ((9.0, math.log(100)), (-1.0, 0.0), (2.0, 2.0)):
        with torch.no_grad():
            objective.net.logit_scale.fill_(value)
            objective.after_step(1)
        assert objective.net.logit_scale.item() == pytest.approx(kept)


def test_learning_rate_is_a_ramp_and_half_a_cosine() -> None:
    rates = [learning_rate(i, steps=110, lr=2.0, warmup_steps=10) for i in range(111)]
    assert rates[0] == pytest.approx(0.2) and rates[9] == rates[10] == pytest.approx(2.0)
    assert rates[60] == pytest.approx(1.0)
    assert rates[35] == pytest.approx(1 + math.cos(math.pi / 4))
    assert rates[110] == pytest.approx(0.0)
    assert learning_rate(99, steps=100, lr=2.0, warmup_steps=10, schedule="const") == 2.0
    assert learning_rate(0, steps=10, lr=2.0, warmup_steps=0) == 2.0
