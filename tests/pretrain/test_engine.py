"""The engine's choices, each against the same training without it or against the formula written plainly."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.pretrain.test_train import close, lines, norms, run
from tests.pretrain.tiny import CASES, changed, config, make_pool
from winnow.infra.errors import UsageError, WinnowError
from winnow.infra.params import ParameterError
from winnow.pretrain.checkpoint.resume import STATE
from winnow.pretrain.data.loader import Batches
from winnow.pretrain.data.samples import Samples
from winnow.pretrain.engine.optimizers import learning_rate, make_optimizer
from winnow.pretrain.loop import make_objective

THIS = "tests.pretrain.tiny"
VIT: dict[str, Any] = {
    "timm": "vit_tiny_patch16_224",
    "size": 32,
    "kwargs": {"depth": 1, "embed_dim": 16, "num_heads": 2},
}


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_pool(tmp_path_factory.mktemp("pool"))


@pytest.fixture(scope="module")
def plain(pool: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CLIP on AdamW, 6 steps."""
    out = tmp_path_factory.mktemp("plain")
    run(pool, out, config(log_every=1))
    return out


def losses(out: Path) -> list[float]:
    return [line["loss"] for line in lines(out) if "loss" in line]


def by_hand(pool: str, c: Any, step: Any) -> list[dict[str, torch.Tensor]]:
    """The weights after each step of a plain loop, which `step(parameters by name, lr)` moves by their gradients."""
    objective = make_objective(c, seed=0)
    trained = {name: p for name, p in objective.named_parameters() if p.requires_grad}
    seen = []
    with Batches(Samples(pool, None), objective.views, seed=0, batch=8, last=6) as batches:
        for i, batch in enumerate(batches):
            objective.zero_grad()
            objective({name: torch.from_numpy(array) for name, array in batch.items()}).total.backward()
            with torch.no_grad():
                step(objective, trained, learning_rate(i, steps=6, lr=c.lr, warmup_steps=c.warmup_steps))
                objective.after_step(i + 1)
            seen.append({name: p.detach().clone() for name, p in trained.items()})
    return seen


def exported(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix("net."): value for name, value in weights.items()}


def test_lars_is_algorithm_1_of_the_paper(pool: str, tmp_path: Path) -> None:
    """λ = η ‖w‖ / (‖g‖ + β ‖w‖) for each layer, its momentum, and plain SGD for what weight decay spares.

    The rate is constant, for timm's momentum leaves it out.
    """
    c = config(optimizer="lars", lr=2.0, momentum=0.8, weight_decay=0.1, schedule="const", warmup_steps=0)
    velocity: dict[str, torch.Tensor] = {}

    def step(objective: Any, trained: dict, lr: float) -> None:
        for name, w in trained.items():
            g = w.grad
            if objective.decays(name, w):
                g = 0.001 * w.norm() / (g.norm() + 0.1 * w.norm() + 1e-8) * (g + 0.1 * w)
            velocity[name] = 0.8 * velocity.get(name, torch.zeros_like(w)) + lr * g
            w -= velocity[name]

    close(run(pool, tmp_path, c), exported(by_hand(pool, c, lambda o, t, _: step(o, t, 2.0))[-1]))


def test_sgd_is_sgd(pool: str, tmp_path: Path) -> None:
    c = config(optimizer="sgd", lr=0.3, momentum=0.8, weight_decay=0.01, grad_clip=0.5)
    velocity: dict[str, torch.Tensor] = {}

    def step(objective: Any, trained: dict, lr: float) -> None:
        norm = torch.stack([w.grad.norm() for w in trained.values()]).norm()
        for name, w in trained.items():
            g = w.grad * min(1.0, 0.5 / float(norm)) + (0.01 * w if objective.decays(name, w) else 0)
            velocity[name] = 0.8 * velocity.get(name, torch.zeros_like(w)) + g
            w -= lr * velocity[name]

    close(run(pool, tmp_path, c), exported(by_hand(pool, c, step)[-1]))


@pytest.mark.parametrize("optimizer", ["sgd", "lars"])
def test_other_optimisers_resume(optimizer: str, pool: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    c = config(objective=f"{THIS}:Dying", optimizer=optimizer, save_every=2)
    whole = run(pool, tmp_path / "whole", c)
    monkeypatch.setenv("PRETRAIN_TEST_DIE_AT", "3")
    with pytest.raises(KeyboardInterrupt):
        run(pool, tmp_path / "out", c)
    monkeypatch.setenv("PRETRAIN_TEST_DIE_AT", "0")
    weights = run(pool, tmp_path / "out", c)
    assert all(torch.equal(weights[name], value) for name, value in whole.items())


@pytest.mark.parametrize("stage", [0, 2])
def test_the_running_mean_is_exported(stage: int, pool: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """m ← d m + (1 − d) w after each step, from the weights at the start, also over an interruption."""
    c = config(objective=f"{THIS}:Dying", ema=0.7, zero_stage=stage, save_every=2)
    monkeypatch.setenv("PRETRAIN_TEST_DIE_AT", "5")
    with pytest.raises(KeyboardInterrupt):
        run(pool, tmp_path, c)
    monkeypatch.setenv("PRETRAIN_TEST_DIE_AT", "0")
    weights = run(pool, tmp_path, c)

    start = make_objective(c, seed=0)
    mean = {name: value.detach().clone() for name, value in start.named_parameters()}
    optimizer = None

    def step(objective: Any, trained: dict, lr: float) -> None:
        nonlocal optimizer
        optimizer = optimizer or make_optimizer(objective, c.optimizer, c.lr, trained.items())
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()

    for moved in by_hand(pool, c, step):
        mean = {name: 0.7 * mean[name] + 0.3 * moved[name] for name in mean}
    close(weights, exported(mean))
    last = load_file(tmp_path / "resume" / "step-00000006" / STATE)
    assert not torch.equal(last["model/net.visual.conv1.weight"], weights["visual.conv1.weight"])


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_fp16_scales_the_loss(stage: int, pool: str, plain: Path, tmp_path: Path) -> None:
    """Gradients of norm 50 overflow at the first scale; without that step it learns as much as in fp32."""
    run(pool, tmp_path, config(precision="fp16", log_every=1, zero_stage=stage))
    ours, reference = losses(tmp_path), losses(plain)
    assert ours != reference and ours[0] == pytest.approx(reference[0], abs=0.01)
    assert ours[-1] == pytest.approx(reference[-1], abs=0.1)
    assert [line["loss_scale"] for line in lines(tmp_path) if "loss_scale" in line] == [32768] * 6
    assert [norm is None for norm in norms(tmp_path)] == [True] + [False] * 5


def test_fp16_has_the_gradient_of_fp32(pool: str, tmp_path: Path) -> None:
    """The norms of three steps of SGD without momentum, with weights that hardly move."""
    c = config(optimizer="sgd", momentum=0.0, lr=1e-6, warmup_steps=0, log_every=1, grad_clip=1.0)
    for precision in ("fp32", "fp16"):
        run(pool, tmp_path / precision, changed(c, precision=precision))
    half, full = norms(tmp_path / "fp16"), norms(tmp_path / "fp32")
    assert half[0] is None and half[1:] == pytest.approx(full[1:], rel=0.02)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_fp16_leaves_out_a_step_that_overflows(
    stage: int, pool: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scale is halved, the weights stay, and what was learned of the scale outlives an interruption."""
    c = config(objective=f"{THIS}:Brightness", precision="fp16", zero_stage=stage, log_every=1, save_every=1)
    objective = type(make_objective(c, seed=0))
    forward = objective.forward

    def steep(self: Any, batch: dict[str, torch.Tensor]) -> Any:
        result = forward(self, batch)
        return result._replace(total=result.total * (1e38 if steep.now else 1e-3))  # type: ignore[attr-defined]

    monkeypatch.setattr(objective, "forward", steep)

    def until(step: int, overflows: bool, death: bool = True) -> None:
        steep.now = overflows  # type: ignore[attr-defined]
        with monkeypatch.context() as patch:

            def after_step(self: Any, number: int) -> None:
                if death and number == step:
                    raise KeyboardInterrupt

            patch.setattr(objective, "after_step", after_step)
            run(pool, tmp_path, c)

    with pytest.raises(KeyboardInterrupt):
        until(2, overflows=False)
    before = load_file(tmp_path / "resume" / "step-00000001" / STATE)
    with pytest.raises(KeyboardInterrupt):
        until(4, overflows=True)
    after = load_file(tmp_path / "resume" / "step-00000003" / STATE)
    assert all(torch.equal(before[name], after[name]) for name in before)
    until(0, overflows=False)
    scales = [line["loss_scale"] for line in lines(tmp_path) if "loss_scale" in line]
    assert scales == [65536, 32768, 16384, 16384, 16384, 16384]
    assert [line["grad_norm"] is None for line in lines(tmp_path) if "loss" in line or "squared_error" in line] == [
        False, True, True, False, False, False,
    ]  # fmt: skip


def test_activations_computed_again_give_the_same_weights(
    pool: str, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import open_clip.transformer

    calls = []
    again = open_clip.transformer.checkpoint
    monkeypatch.setattr(open_clip.transformer, "checkpoint", lambda *a, **k: calls.append(1) or again(*a, **k))
    weights = run(pool, tmp_path, config(activation_checkpointing=True, log_every=1))
    assert len(calls) == 6 * 2  # towers of one layer
    close(weights, load_file(plain / "model.safetensors"))


@pytest.mark.parametrize("name", ["simclr", "moco", "diffusion"])
def test_every_kind_of_network_can_compute_activations_again(name: str, pool: str, tmp_path: Path) -> None:
    c = config(**CASES[name], log_every=1)
    run(pool, tmp_path / "plain", c)
    run(pool, tmp_path / "again", changed(c, activation_checkpointing=True))
    assert losses(tmp_path / "again") == pytest.approx(losses(tmp_path / "plain"), rel=1e-4)


def test_a_network_that_cannot_compute_again_is_refused(pool: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot recompute activations"):
        run(pool, tmp_path, config(objective=f"{THIS}:Brightness", activation_checkpointing=True))


@pytest.mark.parametrize("stage", [1, 3])
def test_offloading_trains_the_same(stage: int, pool: str, plain: Path, tmp_path: Path) -> None:
    close(run(pool, tmp_path, config(zero_stage=stage, offload=True)), load_file(plain / "model.safetensors"))


@pytest.mark.parametrize(("stage", "clip"), [(0, 0.3), (2, 0.3), (3, 0.3)])
def test_gradients_are_clipped(stage: int, clip: float, pool: str, plain: Path, tmp_path: Path) -> None:
    """SGD shows what Adam hides: the first step is no longer than lr · clip; the log has the norm before."""
    c = config(optimizer="sgd", momentum=0.0, weight_decay=0.0, lr=1.0, warmup_steps=0, grad_clip=clip, log_every=1)
    c = changed(c, samples_seen=8, zero_stage=stage)
    weights = run(pool, tmp_path, c)
    start = exported(dict(make_objective(c, seed=0).named_parameters()))
    moved = torch.stack([(weights[name].reshape(value.shape) - value).norm() for name, value in start.items()]).norm()
    assert float(moved.detach()) == pytest.approx(clip, rel=1e-3)
    assert norms(tmp_path)[0] == pytest.approx(norms(plain)[0], rel=1e-4) and norms(plain)[0] > clip


@dataclasses.dataclass(frozen=True)
class Coupled:
    """A case of GradCache: what to train, without batch normalisation."""

    name: str
    changes: dict[str, Any]


COUPLED = [
    Coupled("clip", {}),
    Coupled("siglip", CASES["siglip"]),
    Coupled("simclr", {"objective": "simclr", "model": VIT}),
]


@pytest.mark.parametrize("case", COUPLED, ids=lambda case: case.name)
@pytest.mark.parametrize("settings", [{}, {"zero_stage": 2}, {"num_processes": 2}], ids=["one", "zero", "two"])
def test_grad_cache_is_the_single_big_batch(case: Coupled, settings: dict, pool: str, tmp_path: Path) -> None:
    """Losses and gradients of six steps of SGD, in four parts (two in each of two processes) and in one."""
    c = config(**case.changes, optimizer="sgd", lr=0.1, momentum=0.0, log_every=1)
    parts = 2 if "workers" in settings else 4
    big = run(pool, tmp_path / "big", c)
    cut = run(pool, tmp_path / "cut", changed(c, **settings, grad_cache=parts))
    assert losses(tmp_path / "cut") == pytest.approx(losses(tmp_path / "big"), rel=1e-5)
    assert norms(tmp_path / "cut") == pytest.approx(norms(tmp_path / "big"), rel=1e-4)
    for name, value in big.items():
        torch.testing.assert_close(cut[name], value, rtol=1e-4, atol=1e-6)


def test_grad_cache_repeats_dropout(pool: str, tmp_path: Path) -> None:
    """Features and their gradient must see the same units dropped; then the loss in parts is that of any one pass."""
    from tests.pretrain.groups import alone
    from winnow.pretrain.engine.engine import Engine

    model = {**VIT, "kwargs": {**VIT["kwargs"], "proj_drop_rate": 0.5}}
    c = config(
        objective="simclr",
        model=model,
        grad_cache=2,
        optimizer="sgd",
        momentum=0.0,
        weight_decay=0.0,
        lr=1.0,
        warmup_steps=0,
    )
    with alone():
        objective = make_objective(c, seed=0)
        with Batches(Samples(pool, None), objective.views, seed=0, batch=8, last=1) as batches:
            arrays = {name: torch.from_numpy(array) for name, array in next(batches).items()}
        parts = [{name: value.chunk(2)[i] for name, value in arrays.items()} for i in range(2)]
        start = {name: value.detach().clone() for name, value in objective.named_parameters()}
        torch.manual_seed(5)
        engine = Engine(objective, c, torch.device("cpu"))
        torch.manual_seed(5)
        engine.step(parts, 0, False)
        moved = {name: start[name] - value for name, value in objective.named_parameters()}
        with torch.no_grad():
            for name, value in objective.named_parameters():
                value.copy_(start[name])
        torch.manual_seed(5)  # the parts one after the other, as they were, in one graph
        rows = [torch.cat(column) for column in zip(*(objective.embed(part) for part in parts), strict=True)]
        grads = torch.autograd.grad(objective.loss(tuple(rows)).total, list(objective.parameters()))
        for (name, _), grad in zip(objective.named_parameters(), grads, strict=True):
            torch.testing.assert_close(moved[name], grad, rtol=1e-4, atol=1e-6)
        engine.close()


def test_grad_cache_is_refused_with_batch_normalisation(pool: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="has batch normalisation"):
        run(pool, tmp_path, config(**CASES["simclr"], grad_cache=2))


def test_grad_cache_is_refused_for_a_loss_of_ones_own(pool: str, tmp_path: Path) -> None:
    """A subclass of CLIP inherits `loss`, which need not be its own."""
    with pytest.raises(ParameterError, match="no features apart from its loss"):
        run(pool, tmp_path, config(objective=f"{THIS}:Dying", grad_cache=2))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ema": 0.9, "zero_stage": 3}, "ema is a mean of whole weights"),
        ({**CASES["moco"], "zero_stage": 3}, "momentum encoder"),
        ({"grad_cache": 2, "zero_stage": 3}, "within one forward pass"),
        ({"grad_cache": 2, "accumulation_steps": 2}, "take one"),
        ({**CASES["moco"], "grad_cache": 2}, "no features apart from its loss"),
        ({**CASES["diffusion"], "grad_cache": 2}, "accumulation_steps can"),
        ({"accumulation_steps": 2}, "grad_cache, which gives the whole batch's gradient"),
        ({"grad_cache": 3}, "cannot be divided evenly among 1 processes in 3 parts"),
        ({"optimizer": "lars", "zero_stage": 1}, "ZeRO cuts the layers"),
        ({"offload": True}, "take zero_stage 1, 2 or 3"),
        ({"deepspeed": {"train_batch_size": 16}}, "train_batch_size 16 contradicts batch_size, which is 8"),
        (
            {"deepspeed": {"gradient_accumulation_steps": 2}},
            "gradient_accumulation_steps 2 contradicts accumulation_steps",
        ),
        ({"deepspeed": {"zero_optimization": {"stage": 2}}}, "contradicts zero_stage, which is 0"),
        ({"deepspeed": {"zero_optimization": {"offload_optimizer": {}}}}, "needs `offload: true`"),
        ({"deepspeed": {"fp16": {"enabled": True}}}, "fp16 is set by precision"),
        ({"deepspeed": {"optimizer": {"type": "Adam"}}}, "optimizer is set by optimizer"),
    ],
)
def test_what_cannot_work_together_is_refused_with_the_reason(changes: dict, words: str) -> None:
    with pytest.raises(ParameterError) as error:
        config(**changes)
    assert words in str(error.value)


def test_deepspeeds_config_may_be_overridden(pool: str, plain: Path, tmp_path: Path) -> None:
    over = {"train_batch_size": 8, "zero_optimization": {"reduce_bucket_size": 1000}, "gradient_clipping": 1e-6}
    weights = run(pool, tmp_path / "clipped", config(deepspeed=over, zero_stage=1, optimizer="sgd", weight_decay=0.0))
    start = exported(dict(make_objective(config(), seed=0).named_parameters()))
    for name, value in start.items():
        torch.testing.assert_close(weights[name].reshape(value.shape), value.detach(), rtol=0, atol=1e-6)
    with pytest.raises(UsageError, match="DeepSpeed refuses its config"):
        run(pool, tmp_path / "wrong", config(deepspeed={"zero_optimization": {"reduce_bucket_size": "many"}}))


@pytest.mark.parametrize("workers", [1, 2])
def test_a_loss_that_is_not_finite_ends_the_training(workers: int, pool: str, tmp_path: Path) -> None:
    c = config(optimizer="sgd", lr=1e30, warmup_steps=0, log_every=1, num_processes=workers)
    with pytest.raises(WinnowError, match=r"loss is not finite at step \d.*lower lr"):
        run(pool, tmp_path, c)
