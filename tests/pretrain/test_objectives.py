"""What every registered objective must do."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests import drawing
from tests.pretrain.test_train import lines, run
from tests.pretrain.tiny import CASES, MODEL, changed, config, make_pool
from winnow.infra.errors import UsageError
from winnow.infra.params import params
from winnow.infra.pool.index import IndexStage
from winnow.infra.stages.executors import SerialExecutor
from winnow.infra.stages.runner import execute
from winnow.infra.stages.stage import Manifest
from winnow.pretrain.data.samples import Samples
from winnow.pretrain.encoder import load_encoder
from winnow.pretrain.launch import launch
from winnow.pretrain.loop import Job
from winnow.pretrain.objectives import OBJECTIVES
from winnow.pretrain.objectives.base import Objective
from winnow.pretrain.sections import SourceConfig
from winnow.pretrain.stage import PretrainStage, TrainRun


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_pool(tmp_path_factory.mktemp("pool"))


@pytest.fixture(scope="module")
def wholes(pool: str, tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    """Directories of uninterrupted trainings of 6 steps, by objective."""
    done: dict[str, Path] = {}

    def whole(name: str) -> Path:
        if name not in done:
            done[name] = tmp_path_factory.mktemp(name)
            run(pool, done[name], config(**CASES[name], log_every=1))
        return done[name]

    return whole


def test_each_has_its_case() -> None:
    assert sorted(CASES) == OBJECTIVES.names()


@pytest.mark.parametrize("name", CASES)
def test_its_checkpoint_is_an_encoder(name: str, wholes) -> None:  # type: ignore[no-untyped-def]
    """Rebuilt from the folder alone, and gives a unit vector an image."""
    whole = wholes(name)
    encoder = load_encoder(str(whole), device="cpu")
    assert (whole / "open_clip_config.json").exists() == encoder.has_text
    side = encoder.image_size
    features = encoder.encode_images(np.random.default_rng(0).random((3, 3, side, side), np.float32))
    assert features.shape == (3, encoder.dim)
    np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in CASES if OBJECTIVES.load(name).cacheable])
def test_a_batch_cut_by_grad_cache_trains_as_a_whole(name: str, pool: str, tmp_path: Path) -> None:
    c = config(**CASES[name] | {"model": MODEL}, log_every=1, samples_seen=24)
    for parts in (1, 4):
        run(pool, tmp_path / str(parts), changed(c, grad_cache=parts))
    whole, cut = (
        [(line["loss"], line["grad_norm"]) for line in lines(tmp_path / str(parts)) if "loss" in line]
        for parts in (1, 4)
    )
    np.testing.assert_allclose(cut, whole, rtol=1e-3)


def test_two_processes_train_as_one(pool: str, wholes, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """The losses of six steps. AdamW magnifies the noise of gradients near zero, so weights are compared elsewhere."""
    configs = {name: config(**case, num_processes=2, log_every=1) for name, case in CASES.items()}
    # One start of the processes does them all.
    launch([Job(c, pool, None, str(tmp_path / name), seed=0, key="key") for name, c in configs.items()], via="local")
    for name in CASES:
        ours, reference = (
            [line["loss"] for line in lines(out) if "loss" in line] for out in (tmp_path / name, wholes(name))
        )
        assert ours == pytest.approx(reference, rel=1e-3), name


@params
class Empty:
    pass


def make(**attributes: Any) -> type[Objective]:
    """A subclass with the required methods, and these attributes; None leaves one out."""

    def method(self: Any, *args: Any) -> None:
        return None

    required = dict.fromkeys(("__init__", "views", "forward", "encoder", "build_encoder"), method)
    body = {name: value for name, value in ({"Config": Empty} | required | attributes).items() if value is not None}
    return type("Custom", (Objective,), body | {"__module__": "nowhere"})


@pytest.mark.parametrize("name", ["__init__", "views", "forward", "encoder", "build_encoder", "Config"])
def test_a_class_that_lacks_something_is_refused_when_it_is_made(name: str) -> None:
    make()
    with pytest.raises(UsageError) as error:
        make(**{name: None})
    assert error.value.what == f"the objective Custom has no {name}"


def test_a_config_without_types_is_refused() -> None:
    with pytest.raises(UsageError, match="Config of the objective Custom is not a params class"):
        make(Config=object)


def test_traits_are_inherited() -> None:
    clip, siglip = OBJECTIVES.load("clip"), OBJECTIVES.load("siglip")
    assert (siglip.couples_batch, siglip.needs_text, siglip.network) == (True, True, "encoder")
    assert {"couples_batch", "needs_text"} <= set(vars(clip)) and not {"couples_batch", "needs_text"} & set(
        vars(siglip)
    )
    assert siglip.Config is not clip.Config


def test_columns_reach_the_objective(tmp_path: Path) -> None:
    """A column of the pool, and one measured on it, each with its sample; of a further source null where it lacks."""
    items = [drawing.sample(i) for i in range(12)]
    for i, item in enumerate(items):
        item["row"]["rank"] = i
    drawing.write_tar(tmp_path / "shards" / "00000.tar", items)
    drawing.write_parquet(tmp_path / "shards" / "00000.parquet", items)
    execute(IndexStage((str(tmp_path / "shards"),), str(tmp_path / "pool")), SerialExecutor())
    measured = tmp_path / "columns"
    (measured / "caption_stats-1").mkdir(parents=True)
    words = pa.array([2.0 * i for i in range(12)], pa.float32())
    pq.write_table(pa.table({"words": words}), measured / "caption_stats-1" / "00000.parquet")
    values = {"columns": {"caption_stats": "caption_stats-1"}, "digests": {"caption_stats-1": "d"}}
    write_manifest(measured, values)
    (tmp_path / "other").mkdir()
    other = make_pool(tmp_path / "other")
    names = ("rank", "caption_stats.words")
    samples = Samples(str(tmp_path / "pool"), None, (SourceConfig(pool=other),), names, str(measured))
    for sample in samples.read(np.arange(12)):
        rank = sample.columns["rank"]
        assert sample.text.endswith(f" {rank}") and sample.columns["caption_stats.words"] == 2.0 * rank
    assert samples.read(np.array([15]))[0].columns == {"rank": None, "caption_stats.words": None}
    with pytest.raises(UsageError, match='reads column "sharpness", which is not in the pool'):
        Samples(str(tmp_path / "pool"), columns=("sharpness",))
    with pytest.raises(UsageError, match=r'"language\.english" has not been measured'):
        Samples(str(tmp_path / "pool"), columns=("language.english",), measured=str(measured))


def test_measured_columns_are_part_of_the_content_key(
    pool: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {"columns": {"caption_stats": "caption_stats-1"}, "digests": {"caption_stats-1": "d"}}
    write_manifest(tmp_path / "columns", values)
    run_ = TrainRun("all", 0, pool, None, "digest", str(tmp_path / "columns"))
    stage = PretrainStage(config(), (run_,), str(tmp_path / "out"))
    assert stage.plan()[0].inputs == {"data": "digest"}
    monkeypatch.setattr(OBJECTIVES.load("clip"), "columns", ("caption_stats.words", "rank"))
    assert stage.plan()[0].inputs == {"data": "digest", "measure caption_stats": "d"}


def write_manifest(folder: Path, values: dict[str, Any]) -> None:
    """Of a finished measure stage, as far as a training looks at it."""
    manifest = Manifest("measure", 1, "key", {}, {}, 1, 12, {"count": 0}, {}, values)
    facts = {name: value for name, value in vars(manifest).items() if name != "url"}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "manifest.json").write_text(json.dumps(facts))
