"""`winnow evaluate` from the command line: its files, messages and exit status when a part of it fails."""

import json

import pyarrow.parquet as pq
import pytest

from tests.evaluate.sets import write_classification, write_config, write_retrieval
from winnow.pipeline.cli import main


@pytest.fixture
def winnow(monkeypatch, capsys):
    def run(*words):
        monkeypatch.setattr("sys.argv", ["winnow", "evaluate", *map(str, words)])
        try:
            main()
            status = 0
        except SystemExit as ended:
            status = ended.code or 0
        return (status, *capsys.readouterr())

    return run


@pytest.fixture
def data(tmp_path):
    write_classification(tmp_path / "data", "wds_good_test")
    write_retrieval(tmp_path / "data", "wds_pairs_test")
    return tmp_path / "data"


def rows_of(out):
    return pq.read_table(out / "scores.parquet").to_pylist()


def test_broken_sets_affect_no_other(winnow, data, tmp_path):
    for number in range(4):
        (write_classification(data, f"wds_b{number}_test") / "classnames.txt").write_text("one\n")
    out = tmp_path / "out"
    status, said, _ = winnow(write_config(tmp_path), "--data", data, "--out", out, "--executor", "serial")
    assert status == 0 and {row["task"] for row in rows_of(out)} == {"good", "pairs"}
    assert said.count("wds_b") == 4 and "wds_b3_test/classnames.txt: fewer than two class names" in said
    assert {json.loads(line)["key"] for line in (out / "eval_results.jsonl").read_text().splitlines()} == {
        "good",
        "pairs",
    }
    assert "The average is over good, pairs." in said


def test_a_checkpoint_without_any_score_fails_the_run_and_affects_no_other(winnow, data, tmp_path):
    spec, out = write_config(tmp_path), tmp_path / "out"
    (tmp_path / "w.pt").write_bytes(b"no weights")
    words = ("--data", data, "--out", out, "--executor", "serial")
    status, said, error = winnow(f"{spec.rpartition(':')[0]}:{tmp_path}/w.pt", spec, *words)
    assert status == 1 and {row["checkpoint"] for row in rows_of(out)} == {spec}
    assert "| good" in said and error.splitlines()[-1].startswith("winnow: no score of ")
    assert error.count("cannot be loaded") == 1 and said.count("cannot be loaded") == 1
    # Its units do not count as finished: the next run tries them again.
    assert winnow(f"{spec.rpartition(':')[0]}:{tmp_path}/w.pt", spec, *words)[0] == 1
    events = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [event["todo"] for event in events if event["event"] == "start" and event["stage"] == "evaluate"] == [4, 2]


def test_columns_are_in_the_given_order(winnow, data, tmp_path):
    spec = write_config(tmp_path)
    words = (
        "--data",
        data,
        "--out",
        tmp_path / "out",
        "--executor",
        "serial",
        "--tasks",
        "good",
        "--protocols",
        "zeroshot",
    )
    _, said, _ = winnow("ViT-S-32-alt:random", spec, *words)
    header = said.splitlines()[0]
    assert header.index("ViT-S-32-alt") < header.index("tiny-clip")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--tasks", ","), "no task to evaluate"),
        (("--tasks", "goood"), 'Did you mean "good"'),
        (("--precision", "fp8"), 'unknown precision "fp8"'),
        (("--max-skipped", "-1"), "max_skipped"),
        (("--protocols", "linear_probe"), "The first: the set has no train split."),
    ],
)
def test_a_wrong_command_is_refused(winnow, data, tmp_path, words, message):
    write_classification(data, "wds_good_test")
    spec = write_config(tmp_path)
    status, _, error = winnow(spec, "--data", data, "--out", tmp_path / "out", "--executor", "serial", *words)
    assert status == 2 and message in error


def test_a_folder_is_the_same_with_and_without_its_slash(winnow, tmp_path, data):
    (tmp_path / "empty").mkdir()
    status, _, error = winnow(tmp_path / "empty", f"{tmp_path}/empty/", "--data", data, "--out", tmp_path / "out")
    assert status == 2 and "is given twice" in error
