"""What a training says of itself."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.pretrain.test_train import lines, run
from tests.pretrain.tiny import MODEL, Brightness, config, make_pool
from winnow.infra.params import ParameterError
from winnow.pretrain.launch import launch
from winnow.pretrain.loop import Job, make_objective
from winnow.pretrain.monitor.flops import model_flops, peak_flops
from winnow.pretrain.objectives.base import Losses

THIS = "tests.pretrain.tiny"


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_pool(tmp_path_factory.mktemp("pool"), broken=(3, 17))


def scalars(out: Path) -> dict[str, list[tuple[int, float]]]:
    board = EventAccumulator(str(out / "tensorboard"))
    board.Reload()
    return {tag: [(event.step, event.value) for event in board.Scalars(tag)] for tag in board.Tags()["scalars"]}


def test_every_step_on_the_board_and_in_the_log(pool: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also over an interruption: what was written after the checkpoint is taken back."""
    c = config(objective=f"{THIS}:Dying", log_every=1, save_every=2)
    monkeypatch.setenv("PRETRAIN_TEST_DIE_AT", "4")
    with pytest.raises(KeyboardInterrupt):
        run(pool, tmp_path, c)
    monkeypatch.setenv("PRETRAIN_TEST_DIE_AT", "0")
    run(pool, tmp_path, c)
    logged = [line for line in lines(tmp_path) if "lr" in line]
    assert [line["step"] for line in logged] == [1, 2, 3, 4, 5, 6]
    board = scalars(tmp_path)
    wanted = {"loss", "accuracy", "lr", "grad_norm", "logit_scale", "samples_per_second"}
    wanted |= {"samples_per_second_per_worker", "data_wait", "replaced"}
    assert set(board) == wanted and wanted < set(logged[0])
    for name in wanted - {"samples_per_second", "samples_per_second_per_worker", "data_wait"}:
        assert [step for step, _ in board[name]] == [1, 2, 3, 4, 5, 6]
        assert [value for _, value in board[name]] == pytest.approx([line[name] for line in logged], rel=1e-5)
    assert logged[0]["mfu"] is None  # of a CPU nobody knows the peak
    assert logged[-1]["replaced"] == 3  # 48 samples of 40: one of the two came twice
    assert all(0 <= line["data_wait"] <= 1 for line in logged)


def test_the_note_tells_what_the_log_does(pool: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("winnow.pretrain.monitor.metrics._NOTE_EVERY", 0.0)
    notes: list[str] = []
    monkeypatch.setattr("winnow.pretrain.monitor.metrics.write_note", lambda url, text: notes.append(text))
    job = Job(config(log_every=2), pool, None, str(tmp_path), seed=0, note=str(tmp_path / "note"))
    launch([job], via="local")
    assert notes[-1].startswith("step 6/6 accuracy ")
    for word in (" loss ", " lr ", " grad ", " scale ", " samples/s ", " waiting ", " replaced ", " left"):
        assert word in notes[-1]


def test_flops_are_counted_by_hand() -> None:
    """A linear layer of 48 by 1: forward 2·48, and backward the same for its weight; its input wants no gradient."""
    objective = Brightness(None, MODEL, None)
    batch = {"pixels": torch.rand(2, 48), "target": torch.rand(2)}
    assert model_flops(objective, batch) == 2 * 48 * 2


def test_flops_of_a_transformer_are_those_of_its_matrices() -> None:
    """CLIP's towers, term by term; backward costs twice forward but for the patches, which want no gradient."""
    objective = make_objective(config(), seed=0)
    batch = {"image": torch.zeros(2, 3, 32, 32, dtype=torch.uint8), "text": torch.ones(2, 16, dtype=torch.int32)}

    def block(tokens: int, width: int) -> float:
        matrices = 2 * tokens * width * width * (3 + 1 + 4 + 4)
        return matrices + 2 * 2 * tokens * tokens * width

    vision = block(5, 32) + 2 * 32 * 16
    text = block(16, 16) + 2 * 16 * 16
    patches = 2 * 4 * (3 * 16 * 16) * 32
    similarities = 2 * 2 * 2 * 16
    counted = model_flops(objective, batch)
    assert counted == pytest.approx(3 * (vision + text + similarities) + 2 * patches, rel=0.02)


def test_what_cannot_be_counted_is_not() -> None:
    class Strange(Brightness):
        def forward(self, batch: dict[str, torch.Tensor]) -> Losses:
            raise RuntimeError("wants a larger batch")

    assert model_flops(Strange(None, MODEL, None), {"pixels": torch.rand(2, 48)}) is None


@pytest.mark.parametrize(
    ("name", "peak"),
    [  # NVIDIA's data sheets, dense
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A10G", 70e12),
        ("NVIDIA L40S", 362e12),
        ("Tesla T4", 65e12),
        ("GeForce GTX 980", None),
    ],
)
def test_peaks_by_name(name: str, peak: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    found = peak_flops(torch.device("cuda", 0))
    assert found == (None if peak is None else pytest.approx(peak, rel=0.005))
    assert peak_flops(torch.device("cpu")) is None


def test_wandb_has_the_figures(pool: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Offline, W&B keeps them in a binary file in which names and JSON values can be read."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run(pool, tmp_path, config(wandb="tests", log_every=2))
    (file,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    kept, last = file.read_bytes(), [line for line in lines(tmp_path) if "lr" in line][-1]
    for name in ("loss", "grad_norm", "logit_scale"):
        assert name.encode() in kept and str(last[name]).encode() in kept


def test_wandb_must_be_installed() -> None:
    if importlib.util.find_spec("wandb") is not None:
        pytest.skip("wandb is installed")
    with pytest.raises(ParameterError, match="wandb is not installed; pip install wandb"):
        config(wandb="tests")
