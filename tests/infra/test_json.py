"""No file of ours holds the words NaN and Infinity, which are not JSON."""

import json
import math

import pytest

from winnow.evaluate.scores import RESULTS, write_results
from winnow.infra.io import storage
from winnow.infra.stages.progress import RunLog
from winnow.pretrain.monitor.writers import StepLog

FACTS = {"a": math.nan, "b": [math.inf, 1.5], "c": {"d": (-math.inf, 2)}, "e": "NaN"}


def write_log(folder):
    RunLog(url=str(folder)).event(**FACTS)
    return folder / "log.jsonl"


def write_steps(folder):
    log = StepLog(str(folder / "steps.jsonl"), 0, True)
    log.write(**FACTS)
    log.write(**FACTS)
    return folder / "steps.jsonl"


def write_scores(folder):
    write_results(str(folder / RESULTS), [FACTS])
    return folder / RESULTS


def refuse(word):
    raise AssertionError(f"{word} is not JSON")


@pytest.mark.parametrize("write", [write_log, write_steps, write_scores])
def test_lines_have_null_for_what_json_cannot_express(write, tmp_path):
    lines = write(tmp_path).read_text().splitlines()
    assert lines
    for line in lines:
        found = json.loads(line, parse_constant=refuse)
        found.pop("time", None)
        assert found == {"a": None, "b": [None, 1.5], "c": {"d": [None, 2]}, "e": "NaN"}


def test_files_of_results_refuse_it(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        storage.write_json(str(tmp_path / "a.json"), FACTS)
    assert not (tmp_path / "a.json").exists()
