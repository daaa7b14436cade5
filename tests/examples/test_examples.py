"""The README's examples are the files in this folder; they run out of tree (`module:Class`) and registered."""

import re
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from winnow.curation.algebra.parse import parse
from winnow.curation.columns.table import View
from winnow.curation.curate import CurateStage, MeasuredPool
from winnow.curation.filters import FILTERS
from winnow.curation.measures import MEASURES
from winnow.curation.measures.base import make, parse_measures, with_upstream
from winnow.curation.measures.stage import MeasureStage
from winnow.infra.params import ParameterError
from winnow.infra.pool.pool import Pool
from winnow.infra.pool.uids import decode_uids, load_subset
from winnow.infra.stages.executors import SerialExecutor
from winnow.infra.stages.runner import execute

ROOT = Path(__file__).resolve().parents[2]
FILTER, MEASURE = "tests.examples.typical_length:TypicalLength", "tests.examples.brightness:Brightness"


def test_the_readme_shows_these_files():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "curation" / "README.md").read_text(), re.S)
    for name in ("typical_length", "brightness"):
        text = (Path(__file__).parent / f"{name}.py").read_text()
        assert text in blocks and text.count("\n") < 60


@pytest.mark.parametrize("registered", [False, True])
def test_they_run(small_pool, tmp_path, monkeypatch, registered):
    filter_name, measure_name = FILTER, MEASURE
    if registered:
        filter_name, measure_name = "typical_length", "brightness"
        monkeypatch.setitem(FILTERS.table, filter_name, FILTER)
        monkeypatch.setitem(MEASURES.table, measure_name, MEASURE)
    specs = parse_measures({measure_name: {}})
    made = tuple(make(spec, lambda: ("", "")) for spec in with_upstream([*specs, "caption"], specs).values())
    columns, out = str(tmp_path / "columns"), str(tmp_path / "out")
    execute(MeasureStage(small_pool, made, columns), SerialExecutor())
    node = parse(
        {"all": [{filter_name: {"low": 0.2, "high": 0.8}}, {"score": {"brightness.mean": 1, "fraction": 0.9}}]}
    )
    execute(CurateStage(MeasuredPool(small_pool, columns), (("", node),), out), SerialExecutor())
    pool = Pool.open(small_pool)
    length = np.array([len(text) for text in pool.column("text").to_pylist()])
    low, high = np.quantile(length, [0.2, 0.8])
    light = np.concatenate([b["brightness.mean"].to_numpy() for b in View(pool, columns).batches(["brightness.mean"])])
    threshold = np.sort(light)[::-1][int(len(light) * 0.9)]
    kept = decode_uids(pool.column("uid"))[(length >= low) & (length <= high) & (light >= threshold)]
    assert load_subset(f"{out}/subset.npy").tolist() == np.sort(kept).tolist() and 0 < len(kept) < len(length)
    reasons = pq.read_table(f"{out}/reasons.parquet")["reason"].to_pylist()
    assert "typical_length(low=0.2, high=0.8)" in reasons


def test_a_rule_over_two_parameters_is_checked():
    with pytest.raises(ParameterError, match="low must be less than high") as caught:
        parse({"not": {FILTER: {"low": 0.9, "high": 0.1}}})
    assert caught.value.path == ("not", FILTER)
