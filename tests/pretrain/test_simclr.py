import math

import numpy as np
import pytest
import torch
from PIL import Image

from tests.pretrain.tiny import CASES, MODEL, NARROW, config
from winnow.infra.params import ParameterError, build
from winnow.pretrain.loop import make_objective
from winnow.pretrain.objectives.base import Sample
from winnow.pretrain.objectives.contrastive.simclr import Config, nt_xent, projection_head


def test_loss_is_algorithm_1_of_the_paper() -> None:
    n, tau = 6, 0.3
    # In the paper's order: 2k−1 and 2k are the views of image k.
    z = np.random.default_rng(0).normal(size=(2 * n, 5))
    s = [[z[i] @ z[j] / (np.linalg.norm(z[i]) * np.linalg.norm(z[j])) for j in range(2 * n)] for i in range(2 * n)]

    def pair(i: int, j: int) -> float:
        others = sum(math.exp(s[i][k] / tau) for k in range(2 * n) if k != i)
        return -math.log(math.exp(s[i][j] / tau) / others)

    expected = sum(pair(2 * k, 2 * k + 1) + pair(2 * k + 1, 2 * k) for k in range(n)) / (2 * n)
    unit = torch.nn.functional.normalize(torch.from_numpy(z), dim=1)
    loss, accuracy = nt_xent(unit[0::2], unit[1::2], tau)
    assert float(loss) == pytest.approx(expected, abs=1e-12)
    nearest = [max((j for j in range(2 * n) if j != i), key=lambda j: s[i][j]) for i in range(2 * n)]
    assert float(accuracy) == pytest.approx(np.mean([j == i ^ 1 for i, j in enumerate(nearest)]))


def test_equal_views_of_orthogonal_images_leave_the_least_loss() -> None:
    """Closed form: n pairs, each at cosine 1 with its own and 0 with the 2n − 2 others."""
    eye = torch.eye(5, dtype=torch.float64)
    loss, accuracy = nt_xent(eye, eye, 0.5)
    assert float(loss) == pytest.approx(math.log(1 + 8 * math.exp(-2)))
    assert float(accuracy) == 1


def test_head_has_the_papers_layers() -> None:
    head = projection_head(2048, Config())
    assert [tuple(p.shape) for p in head.parameters()] == [(2048, 2048), (2048,), (128, 2048), (128,)]
    assert isinstance(head[1], torch.nn.ReLU)
    normed = projection_head(32, Config(hidden=64, dim=16, head_norm=True))
    kinds = [type(layer).__name__ for layer in normed]
    assert kinds == ["Linear", "BatchNorm1d", "ReLU", "Linear", "BatchNorm1d"]
    assert normed(torch.randn(4, 32)).shape == (4, 16)


@pytest.mark.parametrize("model", [NARROW, MODEL])
def test_it_trains_the_encoder_alone_or_open_clips_image_tower(model: dict) -> None:
    objective = make_objective(config(objective="simclr", model=model), seed=0)
    assert not any("text" in name or "token" in name for name, _ in objective.named_parameters())
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 64, 3), dtype=np.uint8))
    views = [objective.views(Sample(image=image, text=""), np.random.default_rng(i))["views"] for i in (1, 1, 2, 3)]
    assert views[0].shape == (2, 3, 32, 32) and views[0].dtype == np.uint8
    np.testing.assert_array_equal(views[0], views[1])
    assert (views[0][0] != views[0][1]).any() and (views[0] != views[2]).any()
    losses = objective({"views": torch.from_numpy(np.stack(views[1:]))})
    losses.total.backward()
    assert all(p.grad is not None for p in objective.parameters())
    assert not any(name.startswith("head") for name in objective.weights())


def test_batch_norm_sees_both_views_of_the_batch() -> None:
    """Running statistics after one step are those of torch's own batch normalisation over the 2n views together."""
    objective = make_objective(config(**CASES["simclr"]), seed=0)
    views = torch.from_numpy(np.random.default_rng(0).integers(0, 255, (4, 2, 3, 32, 32), dtype=np.uint8))
    plain = objective.build_encoder(objective.model, objective.preprocess())
    plain.load_state_dict(objective.weights())
    plain.train()(torch.cat([views[:, 0], views[:, 1]]))
    objective({"views": views})
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(objective.weights()[name], value)
    assert not torch.equal(plain.trunk.bn1.running_mean, torch.zeros(64))


@pytest.mark.parametrize(
    ("params", "words"),
    [({"temperature": 0.0}, "temperature"), ({"strength": 3.0}, "strength"), ({"dim": 0}, "dim")],
)
def test_wrong_parameters_are_refused(params: dict, words: str) -> None:
    with pytest.raises(ParameterError, match=words):
        build(Config, params, "simclr")
