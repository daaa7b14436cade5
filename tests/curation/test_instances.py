"""Instances of measures: two scorers next to each other, and filters that choose between them."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.evaluate.sets import CONFIG, write_config
from winnow.curation.algebra.fit import columns_of
from winnow.curation.algebra.parse import parse
from winnow.curation.columns.table import View, measure_of, model_columns
from winnow.curation.curate import CurateStage, MeasuredPool
from winnow.curation.measures.base import make, parse_measures, with_upstream
from winnow.curation.measures.stage import MeasureStage
from winnow.infra.errors import UsageError
from winnow.infra.pool.pool import Pool
from winnow.infra.pool.uids import load_subset
from winnow.infra.stages.executors import SerialExecutor
from winnow.infra.stages.runner import execute
from winnow.pretrain.encoder import encoder_digest, load_encoder


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    """Specs of the recipe's scorer and of another encoder, with embeddings of another dimension."""
    folder = tmp_path_factory.mktemp("encoders")
    (folder / "other.json").write_text(json.dumps(CONFIG | {"embed_dim": 8}))
    return write_config(folder), f"{folder / 'other.json'}:random"


TREES = {
    "recipes": {"clip_score": {"fraction": 0.3}},
    "others": {"clip_score": {"fraction": 0.3, "model": "other"}},
    "sum": {"score": {"clip": 1.0, "other": 0.5, "unsafe": -1.0, "fraction": 0.5}},
    "unlike": {"semdedup": {"clusters": 2, "epsilon": 0.5, "column": "other.image"}},
}


def test_two_scorers_give_two_subsets(small_pool, encoders, tmp_path):
    scorer, other = encoders
    specs = parse_measures(
        {"other": {"clip": {"encoder": other, "device": "cpu"}}, "unsafe": {"nsfw": {"embedding": "other"}}}
    )
    trees = {name: parse(tree) for name, tree in TREES.items()}
    names = [name for node in trees.values() for column in columns_of(node) if (name := measure_of(column))]
    specs = with_upstream(names, specs)
    assert {name: spec.needs_scorer for name, spec in specs.items()} == {"clip": True, "other": False, "unsafe": False}
    made = tuple(make(spec, lambda: (scorer, encoder_digest(scorer))) for spec in specs.values())
    columns = str(tmp_path / "columns")
    manifest = execute(MeasureStage(small_pool, made, columns), SerialExecutor())
    assert {name: measured.rpartition("-")[0] for name, measured in manifest.values["columns"].items()} == {
        name: name for name in specs
    }
    stage = CurateStage(MeasuredPool(small_pool, columns), tuple(trees.items()), str(tmp_path / "subsets"))
    execute(stage, SerialExecutor())
    subsets = {name: load_subset(str(tmp_path / "subsets" / name / "subset.npy")).tolist() for name in trees}
    assert len(subsets["recipes"]) == len(subsets["others"]) and subsets["recipes"] != subsets["others"]

    # Each column is what its encoder gives.
    view, table = View(Pool.open(small_pool), columns), []
    for batch in view.batches(["text", "other.text", "other.image", "clip.text", "unsafe.score"]):
        table.append(batch)
        assert (batch["clip.text"].type.list_size, batch["other.text"].type.list_size) == (16, 8)
        expected = load_encoder(other, device="cpu").encode_texts(batch["text"].to_pylist())
        assert np.allclose(np.array(batch["other.text"].to_pylist(), float), expected, atol=1e-3)
    yes, no = zip(*made[2].pairs(), strict=True)
    encoder = load_encoder(other, device="cpu")
    image = np.array(table[0]["other.image"].to_pylist(), float)
    a, b = (np.exp(encoder.logit_scale * image @ encoder.encode_texts(words).T) for words in (yes, no))
    assert np.allclose(table[0]["unsafe.score"].to_numpy(), (a / (a + b)).mean(axis=1), atol=1e-4)


def test_instances_have_separate_files(small_pool, tmp_path):
    def scorer():
        raise AssertionError("no encoder is needed")

    specs = with_upstream(["words", "caption"], parse_measures({"words": {"caption": {}}}))
    made = tuple(make(spec, scorer) for spec in specs.values())
    manifest = execute(MeasureStage(small_pool, made, str(tmp_path)), SerialExecutor())
    ids = manifest.values["columns"]
    assert ids["caption"].removeprefix("caption-") == ids["words"].removeprefix("words-")
    for shard in Pool.open(small_pool).shards:
        tables = [pq.read_table(tmp_path / ids[name] / f"{shard.name}.parquet") for name in ("caption", "words")]
        assert tables[0].equals(tables[1])


def test_an_unknown_instance_is_refused_with_the_nearest_name():
    assert model_columns("scorer") == ("clip.image", "clip.text", "clip.score")
    assert model_columns("l14")[2] == "clip_l14_similarity_score" and model_columns("big")[0] == "big.image"
    with pytest.raises(UsageError, match=r'unknown measure "clip-b23".*Did you mean "clip-b32"'):
        with_upstream(["clip-b23"], parse_measures({"clip-b32": {"clip": {"encoder": "ViT-B-32:openai"}}}))
