"""What an evaluation replaces is kept: the scores of before, next to those of now in the comparison."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.drawing import uid_of
from tests.evaluate.sets import write_classification, write_retrieval, write_train
from winnow.evaluate.report.compare import CompareStage, SubsetEntry
from winnow.evaluate.stage import EvaluateStage
from winnow.infra.errors import WinnowError
from winnow.infra.io import storage
from winnow.infra.stages.executors import SerialExecutor
from winnow.infra.stages.progress import RunLog
from winnow.infra.stages.runner import Budget, execute
from winnow.pipeline import printing
from winnow.pretrain.encoder import encoder_digest

NAMES = ("a/seed-0", "b/seed-0")


def run(stage: EvaluateStage) -> str:
    """Embed and evaluate; what was reported."""
    told = io.StringIO()
    for step in (stage.embedding(), stage):
        execute(step, SerialExecutor(), budget=Budget(math.inf), log=RunLog(stream=told))
    return told.getvalue()


def values(table: Path) -> dict[tuple[str, str], float]:
    """The main metric by checkpoint and task."""
    mains = ("acc1", "mean_recall@1")
    return {(r["checkpoint"], r["task"]): r["value"] for r in pq.read_table(table).to_pylist() if r["metric"] in mains}


@pytest.fixture
def stage(tmp_path: Path) -> EvaluateStage:
    """Encoders that read images alone, so that k-NN scores them, on two sets where two classes share each colour."""
    names = [f"thing {i}" for i in range(12)]
    for folder in ("wds_colors_test", "wds_shades_test"):
        write_train(write_classification(tmp_path / "data", folder, n=24, names=names), classes=12)
    specs = zip(NAMES, ("pixels:8", "pixels:4"), strict=True)
    checkpoints = tuple((name, spec, encoder_digest(spec)) for name, spec in specs)
    return EvaluateStage(checkpoints, str(tmp_path / "data"), str(tmp_path / "scores"), protocols=("knn",))


def comparison(stage: EvaluateStage, folder: Path) -> tuple[dict, str]:
    """`comparison.json` and the text of the subsets a and b."""
    entries = []
    for name in ("a", "b"):
        uids = np.array([tuple(int(uid_of(i)[k : k + 16], 16) for k in (0, 16)) for i in range(3)], "u8,u8")
        (folder / name).mkdir(parents=True, exist_ok=True)
        np.save(folder / name / "subset.npy", np.sort(uids))
        tree = {"label": "all", "kind": "all", "kept": 3, "dropped": 0, "alone": 0, "children": []}
        funnel = {"pool": 3, "kept": 3, "name": name, "filter": "all", "tree": tree}
        storage.write_json(str(folder / name / "funnel.json"), funnel)
        entries.append(SubsetEntry(name, str(folder / name), ((0, f"{name}/seed-0"),)))
    execute(CompareStage(tuple(entries), stage.out, str(folder / "report")), SerialExecutor())
    text = (folder / "report" / "comparison.txt").read_text()
    assert ("Earlier states" in text) == ("Earlier states" in (folder / "report" / "report.html").read_text())
    return json.loads((folder / "report" / "comparison.json").read_text()), text


def test_another_model_under_its_old_name(stage: EvaluateStage, tmp_path: Path) -> None:
    assert "replaces" not in run(stage)
    first, text = comparison(stage, tmp_path / "work")
    assert "earlier" not in first and not (tmp_path / "scores" / "history").exists()
    table = tmp_path / "scores" / "scores.parquet"
    states, kept_bytes = {"before": values(table)}, table.read_bytes()

    again = replace(stage, checkpoints=((NAMES[0], "pixels:1", encoder_digest("pixels:1")), stage.checkpoints[1]))
    told = run(again)
    assert "replaces an earlier result of other inputs or parameters: a%2Fseed-0/colors/knn and 1 more" in told
    states["now"] = values(table)
    kept = tmp_path / "scores" / "history" / "0001"
    assert (kept / "scores.parquet").read_bytes() == kept_bytes
    assert str(kept) in printing.scores(stage.out)

    result, text = comparison(stage, tmp_path / "work")
    (entry,) = result["earlier"]  # b has the same model and the same scores
    assert (entry["state"], entry["subset"], entry["changed"]) == ("0001", "a", "another model")
    rows = {row["of"]: row for row in entry["rows"]}
    mean = {name: np.mean([state["a/seed-0", task] for task in ("colors", "shades")]) for name, state in states.items()}
    for name, state in states.items():
        assert rows["average over 2 tasks"][name]["value"] == pytest.approx(mean[name])
        assert rows["colors"][name]["value"] == pytest.approx(state["a/seed-0", "colors"])
    difference = mean["now"] - mean["before"]
    assert difference != 0 and rows["average over 2 tasks"]["difference"]["value"] == pytest.approx(difference)
    assert "Earlier states of this run" in text and f"{difference:+.3f}" in text
    # Nothing more is kept where nothing is lost: a further task adds to what there is.
    run(again)
    write_retrieval(tmp_path / "data", "wds_further_test")
    run(again)
    assert [path.name for path in kept.parent.iterdir()] == ["0001"]
    # What is kept has a digest, too.
    data = (kept / "scores.parquet").read_bytes()
    (kept / "scores.parquet").write_bytes(data[:-9] + b"x" + data[-8:])
    with pytest.raises(WinnowError, match=r"history/0001: is damaged.*Remove the folder"):
        comparison(replace(stage, checkpoints=again.checkpoints), tmp_path / "work")


def test_another_test_set(stage: EvaluateStage, tmp_path: Path) -> None:
    run(stage)
    write_classification(tmp_path / "data", "wds_colors_test", n=17, names=[f"thing {i}" for i in range(12)])
    run(stage)
    result, _ = comparison(stage, tmp_path / "work")
    assert {(entry["changed"], row["of"]) for entry in result["earlier"] for row in entry["rows"]} == {
        ("another test set", "colors"), ("another test set", "average over 2 tasks")
    }  # fmt: skip
