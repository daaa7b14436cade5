import copy
import math
from collections import deque

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from tests.pretrain.tiny import CASES, NARROW, config
from winnow.infra.params import ParameterError, build
from winnow.pretrain.loop import make_objective
from winnow.pretrain.objectives.base import Sample
from winnow.pretrain.objectives.contrastive import moco
from winnow.pretrain.objectives.contrastive.moco import Config, augmentation, info_nce, projection_head


def test_loss_is_equation_1_of_the_paper() -> None:
    rng = np.random.default_rng(0)
    q, key, queue = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (rng.normal(size=(n, 5)) for n in (4, 4, 9)))
    tau = 0.3
    expected = 0.0
    for i in range(4):
        local = math.exp(q[i] @ key[i] / tau)
        expected -= math.log(local / (local + sum(math.exp(q[i] @ k / tau) for k in queue))) / 4
    loss, accuracy = info_nce(*(torch.from_numpy(x) for x in (q, key, queue)), tau)
    assert float(loss) == pytest.approx(expected, abs=1e-12)
    assert float(accuracy) == np.mean([q[i] @ key[i] > max(q[i] @ k for k in queue) for i in range(4)])


def test_steps_are_those_of_algorithm_1_written_plainly() -> None:
    """Networks with torch's own batch normalisation on each part as on a separate GPU, a deque for the queue."""
    m, tau, parts, n = 0.9, 0.2, 2, 8
    objective = make_objective(config(**CASES["moco"]), seed=0)
    query = objective.build_encoder(objective.model, objective.preprocess())
    query.load_state_dict(objective.net.state_dict())
    f_q = nn.Sequential(query, copy.deepcopy(objective.head)).train()
    f_k = copy.deepcopy(f_q).requires_grad_(False)
    queue = deque(objective.queue.clone(), maxlen=32)
    trained = [parameter for parameter in objective.parameters() if parameter.requires_grad]
    rng = np.random.default_rng(0)

    def by_parts(network: nn.Module, images: torch.Tensor) -> torch.Tensor:
        norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
        before = [(norm.running_mean, norm.running_var) for norm in norms]
        outs, after = [], []
        for images_of_part in images.chunk(parts):
            for norm, (mean, var) in zip(norms, before, strict=True):
                norm.running_mean, norm.running_var = mean.clone(), var.clone()
            outs.append(F.normalize(network(images_of_part), dim=1))
            after.append([(norm.running_mean, norm.running_var) for norm in norms])
        for i, norm in enumerate(norms):
            norm.running_mean, norm.running_var = (sum(part[i][j] for part in after) / parts for j in range(2))
            norm.num_batches_tracked -= parts - 1
        return torch.cat(outs)

    for step in range(5):  # 5 batches of 8: the queue of 32 comes round
        x_q, x_k = torch.from_numpy(rng.integers(0, 256, (2, n, 3, 32, 32), dtype=np.uint8))
        index_ = torch.from_numpy(rng.integers(1 << 62, size=n))
        q = by_parts(f_q, x_q)
        shuffle = sorted(range(n), key=lambda i: int(index_[i]))
        shuffled = by_parts(f_k, x_k[shuffle])
        k = torch.stack([shuffled[shuffle.index(i)] for i in range(n)])
        logits = [torch.cat([(q[i] @ k[i])[None], torch.stack(list(queue)) @ q[i]]) / tau for i in range(n)]
        loss = torch.stack([F.cross_entropy(row, torch.tensor(0)) for row in logits]).mean()

        losses = objective({"query": x_q, "key": x_k, "index": index_})
        torch.testing.assert_close(losses.total, loss, rtol=1e-4, atol=1e-5)
        grads, plain = torch.autograd.grad(losses.total, trained), torch.autograd.grad(loss, list(f_q.parameters()))
        with torch.no_grad():
            for parameter, grad in zip(trained, grads, strict=True):
                parameter -= 0.05 * grad
            objective.after_step(step + 1)
            for parameter, grad in zip(f_q.parameters(), plain, strict=True):
                parameter -= 0.05 * grad
            for reference, ours in zip(f_k.parameters(), f_q.parameters(), strict=True):
                reference.copy_(m * reference + (1 - m) * ours)
            queue.extend(k)

    def same(ours: nn.Module, expected: nn.Module) -> None:
        for name, value in expected.state_dict().items():
            torch.testing.assert_close(ours.state_dict()[name], value, rtol=1e-3, atol=1e-4)

    same(objective.net, f_q[0])
    same(objective.head, f_q[1])
    same(objective.teacher_net, f_k[0])
    same(objective.teacher_head, f_k[1])
    assert int(objective.pointer) == 8
    ordered = objective.queue.roll(-int(objective.pointer), dims=0)  # oldest first
    torch.testing.assert_close(ordered, torch.stack(list(queue)), rtol=1e-3, atol=1e-4)


def test_nothing_flows_back_into_the_key_encoder() -> None:
    objective = make_objective(config(**CASES["moco"]), seed=0)
    trained = {name for name, parameter in objective.named_parameters() if parameter.requires_grad}
    assert trained == {name for name in trained if name.split(".")[0] in ("net", "head")}
    assert len(trained) * 2 == len(list(objective.parameters()))
    saved = objective.state_dict()
    assert {"queue", "pointer"} < saved.keys() and any(name.startswith("teacher_net") for name in saved)
    assert not any("teacher" in name or "queue" in name or "head" in name for name in objective.weights())
    torch.testing.assert_close(objective.queue.norm(dim=1), torch.ones(32))


def test_versions_differ_as_the_papers_do() -> None:
    one, two = projection_head(2048, Config(version=1)), projection_head(2048, Config(version=2))
    assert [tuple(p.shape) for p in one.parameters()] == [(128, 2048), (128,)]
    assert [tuple(p.shape) for p in two.parameters()] == [(2048, 2048), (2048,), (128, 2048), (128,)]
    assert moco.TEMPERATURE == {1: 0.07, 2: 0.2}
    v1, v2 = (augmentation(version, 224, moco.CROPS, blur) for version, blur in ((1, False), (2, True)))
    assert (v1.blur_p, v1.jitter_p, v1.jitter.hue) == (0.0, 1.0, 0.4)
    assert (v2.blur_p, v2.jitter_p, v2.jitter.hue, v2.grey_p) == (0.5, 0.8, 0.1, 0.2)
    for version, blur_p in ((1, 0.0), (2, 0.5)):
        objective = make_objective(config(objective={"moco": {"version": version, "queue": 32}}, model=NARROW), seed=0)
        assert objective.augmentation.blur_p == blur_p
        assert objective.temperature == moco.TEMPERATURE[version]
    assert (Config().queue, Config().momentum, Config().dim) == (65536, 0.999, 128)


def test_views_depend_on_the_generator_alone() -> None:
    objective = make_objective(config(**CASES["moco"]), seed=0)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 64, 3), dtype=np.uint8))
    first, again, other = (objective.views(Sample(image=image, text=""), np.random.default_rng(i)) for i in (1, 1, 2))
    for name in ("query", "key", "index"):
        np.testing.assert_array_equal(first[name], again[name])
        assert np.any(first[name] != other[name])
    assert (first["query"] != first["key"]).any()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"objective": {"moco": {"queue": 36}}}, "queue 36 is not a multiple of batch_size 8; whole batches"),
        ({"objective": "moco", "batch_size": 12, "samples_seen": 60}, "queue 65536 is not a multiple of batch_size 12"),
        ({"objective": {"moco": {"bn_parts": 3}}}, "batch_size 8 is not a multiple of bn_parts 3"),
        (
            {"objective": {"moco": {"bn_parts": 2}}, "num_processes": 4},
            "bn_parts 2 is not a multiple of num_processes 4",
        ),
        ({"objective": "moco", "zero_stage": 3}, "moco keeps a momentum encoder"),
    ],
)
def test_what_cannot_work_is_refused_before_work_starts(changes: dict, words: str) -> None:
    with pytest.raises(ParameterError, match=words):
        config(model=NARROW, **changes)


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"version": 3}, "version must be one of 1, 2, not 3"),
        ({"momentum": 1.0}, "momentum"),
        ({"temperature": -1.0}, "temperature"),
        ({"queue": 0}, "queue"),
        ({"version": 1, "hidden": 32}, "hidden is of version 2"),
    ],
)
def test_wrong_parameters_are_refused(params: dict, words: str) -> None:
    with pytest.raises(ParameterError, match=words):
        build(Config, params, "moco")
