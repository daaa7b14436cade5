"""Single commands protect existing files: inputs are never overwritten and stale outputs are not used."""

import io
import json
import sys
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from tests.benchmarks.metadata import write_metadata
from tests.drawing import write_pool
from tests.evaluate.sets import write_config
from tests.pretrain.tiny import MODEL
from winnow.infra.pool.pool import Pool
from winnow.pipeline.cli import main


@pytest.fixture
def winnow(monkeypatch, capsys, tmp_path):
    """Run a command in `tmp_path`; (status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def call(*words):
        serial = () if words[0] in ("compare", "plan") else ("--executor", "serial")
        monkeypatch.setattr(sys, "argv", ["winnow", *map(str, words), *serial])
        with pytest.raises(SystemExit) as status:
            main()
        captured = capsys.readouterr()
        return status.value.code or 0, captured.out, captured.err

    return call


@pytest.fixture
def shards(tmp_path):
    return write_pool(tmp_path / "S", shards=2, per_shard=6)


def bytes_of(folder):
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "log.jsonl")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_no_command_writes_over_what_it_reads(winnow, shards, tmp_path):
    (tmp_path / "f.yaml").write_text("basic: {language: null, min_side: 8}\n")
    assert winnow("index", "S", "--out", "P")[0] == 0
    assert winnow("measure", "P", "--out", "W", "--measures", "caption")[0] == 0
    assert winnow("reshard", "P", "--out", "R")[0] == 0
    write_metadata(tmp_path / "M", 20, per_file=10)
    before = {name: bytes_of(tmp_path / name) for name in ("S", "P", "W", "R", "M")}
    for words in (
        ("index", "S", "--out", "S"),
        ("reshard", "P", "--out", "S"),
        ("reshard", "R", "--out", "R"),
        ("reshard", "P", "--out", "P"),
        ("curate", "P", "--filters", "f.yaml", "--out", "P"),
        ("curate", "P", "--columns", "W/columns", "--filters", "f.yaml", "--out", "W/columns"),
        ("curate", "M", "--filters", "f.yaml", "--out", "M"),
    ):
        status, _, error = winnow(*words)
        assert status == 2 and "would overwrite" in error, words
    for name, files in before.items():
        assert bytes_of(tmp_path / name) | files == bytes_of(tmp_path / name), name


def test_columns_of_another_pool_are_refused(winnow, shards, tmp_path):
    (tmp_path / "f.yaml").write_text("basic: {language: null, min_side: 8}\n")
    assert winnow("index", "S", "--out", "P")[0] == 0
    assert winnow("measure", "P", "--out", "W", "--measures", "caption")[0] == 0
    assert winnow("curate", "P", "--columns", "W/columns", "--filters", "f.yaml", "--out", "A")[0] == 0
    write_pool(shards, shards=1, per_shard=6, first=100)  # as many samples, others
    assert winnow("index", "S", "--out", "P")[0] == 0
    status, _, error = winnow("curate", "P", "--columns", "W/columns", "--filters", "f.yaml", "--out", "A")
    assert status == 2 and "were measured on another pool" in error


def test_measured_one_after_the_other(winnow, shards, tmp_path):
    """And both are there for a filter that reads them."""
    assert winnow("index", "S", "--out", "P")[0] == 0
    for name in ("caption", "language", "caption"):
        assert winnow("measure", "P", "--out", "W", "--measures", name)[0] == 0
    (tmp_path / "f.yaml").write_text("basic: {language: en, min_words: 1, min_side: 8}\n")
    status, out, _ = winnow("curate", "P", "--columns", "W/columns", "--filters", "f.yaml", "--out", "A")
    assert status == 0 and " of 12 samples" in out
    assert winnow("measure", "P", "--out", "V", "--measures", "caption,language")[0] == 0
    one, both = (json.loads((tmp_path / name / "columns" / "manifest.json").read_text()) for name in ("W", "V"))
    assert one["values"] == both["values"]


def test_a_tar_that_became_shorter(winnow, shards, tmp_path):
    assert winnow("index", "S", "--out", "P")[0] == 0
    tar = sorted(shards.glob("*.tar"))[0]
    tar.write_bytes(tar.read_bytes()[:3000])
    for words in (("reshard", "P", "--out", "R"), ("measure", "P", "--out", "W", "--measures", "content")):
        status, _, error = winnow(*words)
        assert status == 1 and "has changed since it was indexed" in error and tar.name in error


def test_equal_keys_in_a_tree_are_refused(winnow, shards, tmp_path):
    (tmp_path / "f.yaml").write_text("all:\n  - random: {fraction: 0.3, fraction: 0.9}\n")
    status, _, error = winnow("curate", "S", "--filters", "f.yaml", "--out", "A")
    assert status == 2 and "f.yaml, line 2" in error and '"fraction" is given twice' in error
    status, _, error = winnow("curate", "S", "--filters", "none.yaml", "--out", "A")
    assert status == 2 and "none.yaml: no such file" in error


def test_a_foreign_manifest_next_to_the_shards(winnow, shards, tmp_path):
    (shards / "manifest.json").write_text('{"by": "another program"}')
    (shards / "locations.json").write_text("[1, 2]")
    assert winnow("measure", "S", "--out", "W", "--measures", "caption")[0] == 0
    assert (shards / "manifest.json").read_text() == '{"by": "another program"}'


def test_what_cannot_be_resharded(winnow, shards, tmp_path):
    write_metadata(tmp_path / "M", 20, per_file=10)
    status, _, error = winnow("reshard", "M", "--out", "R")
    assert status == 2 and "without images to copy" in error
    (tmp_path / "empty.npy").write_bytes(b"")
    np.savez(tmp_path / "some.npz", a=np.zeros(3))
    for name in ("empty.npy", "some.npz"):
        status, _, error = winnow("reshard", "S", "--subset", name, "--out", "R")
        assert status == 1 and name in error and "NumPy" in error


def test_a_uid_twice_in_a_subset_is_written_twice(winnow, shards, tmp_path):
    assert winnow("index", "S", "--out", "P")[0] == 0
    uids = Pool.open(str(tmp_path / "P")).shards[0].uids()
    np.save(tmp_path / "twice.npy", np.sort(np.concatenate([uids[:3], uids[:1]]), order=("f0", "f1")))
    assert winnow("reshard", "P", "--subset", "twice.npy", "--out", "R")[0] == 0
    made = np.concatenate([shard.uids() for shard in Pool.open(str(tmp_path / "R")).shards])
    assert sorted(made.tolist()) == sorted([*uids[:3].tolist(), uids[0].item()])


def test_a_dangling_link_leaves_the_other_shards(winnow, shards, tmp_path):
    (shards / "00009.tar").symlink_to("nowhere.tar")
    # It counts as many samples as the others have.
    assert winnow("index", "S", "--out", "P", "--max-skipped", "0.3")[0] == 1
    status, out, _ = winnow("index", "S", "--out", "P", "--max-skipped", "0.4")
    assert status == 0 and out.startswith("12 samples in 2 shards, complete with 6 skipped")


def test_a_width_that_the_parquet_lacks_is_the_images(winnow, shards, tmp_path):
    path = sorted(shards.glob("*.parquet"))[0]
    table = pq.read_table(path)
    widths = [240 + i for i in range(table.num_rows)]
    widths[2] = None
    index = table.column_names.index("original_width")
    pq.write_table(table.set_column(index, "original_width", pa.array(widths, pa.int64())), path)
    assert winnow("index", "S", "--out", "P")[0] == 0
    widths[2] = 24  # of the drawn image
    assert Pool.open(str(tmp_path / "P")).shards[0].table()["original_width"].to_pylist() == widths


def test_unusual_facts_cost_a_sample_not_its_shard(winnow, tmp_path):
    shards = write_pool(tmp_path / "S", shards=1, per_shard=8, parquet=False)
    (tar,) = shards.glob("*.tar")
    with tarfile.open(tar) as archive:
        members = [(info, archive.extractfile(info).read()) for info in archive]
    odd = iter(['{"url": "\\ud83d"}', '{"original_width": 99999999999}', '{"original_width": true}', "[" * 100_000])
    with tarfile.open(tar, "w", format=tarfile.GNU_FORMAT, encoding="latin-1") as archive:
        for info, data in members:
            if info.name.endswith(".json") and (text := next(odd, None)):
                data = text.encode()
            if info.name.startswith("000000007"):
                info.name = f"caf\xe9.{info.name.partition('.')[2]}"
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    status, _, error = winnow("index", "S", "--out", "P", "--max-skipped", "3")
    manifest = json.loads((tmp_path / "P" / "manifest.json").read_text())
    assert status == 0, error
    assert manifest["skipped"]["reasons"] == {"a name or text is not UTF-8": 2, "json is not valid": 1}
    assert manifest["items"] == 5
    table = Pool.open(str(tmp_path / "P")).shards[0].table()
    assert set(table["original_width"].to_pylist()) == {24}


def test_a_run_that_fails_half_way_is_not_taken_for_finished(winnow, shards, tmp_path):
    assert winnow("index", "S", "--out", "P")[0] == 0
    assert winnow("reshard", "P", "--out", "R", "--samples-per-shard", "6")[0] == 0
    sorted(shards.glob("*.tar"))[1].unlink()
    assert winnow("reshard", "P", "--out", "R", "--samples-per-shard", "4")[0] == 1
    (tmp_path / "f.yaml").write_text(yaml.safe_dump({"random": {"fraction": 0.5}}))
    status, _, error = winnow("curate", "R", "--filters", "f.yaml", "--out", "A")
    assert status == 1 and "R: is not finished" in error


def test_training_on_captions_needs_a_pool_with_captions(winnow, tmp_path):
    write_pool(tmp_path / "S", shards=1, per_shard=8)
    assert winnow("index", "S", "--no-captions", "--out", "P")[0] == 0
    (tmp_path / "t.yaml").write_text(
        yaml.safe_dump({"model": MODEL, "samples_seen": 8, "batch_size": 4, "warmup_steps": 1})
    )
    status, _, error = winnow("pretrain", "P", "--config", "t.yaml", "--out", "T")
    assert status == 2 and "without asking for captions, from which clip learns" in error, error
    assert winnow("pretrain", "P", "--config", "t.yaml", "--out", "T", "--seed", "-1")[0] == 2


def test_a_comparison_needs_another_directory(winnow, tmp_path):
    (tmp_path / "run").mkdir()
    status, _, error = winnow("compare", "run", "--out", tmp_path / "run")
    assert status == 2 and "compare would write into a run" in error


def test_a_damaged_fit_is_recomputed(winnow, shards, tmp_path):
    assert winnow("index", "S", "--out", "P")[0] == 0
    (tmp_path / "f.yaml").write_text("near_duplicates: {radius: 4}\n")
    assert winnow("curate", "P", "--filters", "f.yaml", "--out", "A")[0] == 0
    subset = (tmp_path / "A" / "subset.npy").read_bytes()
    fits = list((tmp_path / "A").rglob("fits/*.npz"))
    assert fits
    for fit in fits:
        fit.write_bytes(fit.read_bytes()[:40])
    (tmp_path / "A" / "subset.npy").unlink()
    assert winnow("curate", "P", "--filters", "f.yaml", "--out", "A")[0] == 0
    assert (tmp_path / "A" / "subset.npy").read_bytes() == subset


def test_a_column_that_a_filter_names_twice(winnow, shards, tmp_path):
    """The uid is what is compared and what every table has."""
    (tmp_path / "f.yaml").write_text("exact_duplicates: {by: uid, score: original_width}\n")
    status, out, error = winnow("curate", "S", "--filters", "f.yaml", "--out", "A")
    assert status == 0 and "12 of 12 samples" in out, error


def test_parameters_of_measures(winnow, shards, tmp_path):
    """By a mapping, a file or `--set`; and for `curate`, whose filters read a named instance."""
    assert winnow("index", "S", "--out", "P")[0] == 0
    measure = ("measure", "P", "--out", "W", "--measures")
    status, _, error = winnow(*measure, "{small: {clip: {encoders: x}}}")
    assert status == 2 and 'unknown parameter of small "encoders". Did you mean "encoder"?' in error
    status, _, error = winnow(*measure, "caption", "--set", "caption.x=1")
    assert status == 2 and "measures.NAME.PARAMETER=VALUE" in error
    (tmp_path / "m.yaml").write_text("caption: {}\nlangage: {}\n")
    status, _, error = winnow(*measure, "m.yaml")
    assert status == 2 and 'm.yaml, line 2: unknown measure "langage". Did you mean "language"?' in error
    (tmp_path / "m.yaml").write_text("caption: {}\n")
    assert winnow(*measure, "m.yaml")[0] == 0
    (tmp_path / "f.yaml").write_text("clip_score: {model: small, keep: 4}\n")
    given = ("--measures", "{small: {clip: {}}}", "--set", f"measures.small.clip.encoder={write_config(tmp_path)}")
    status, out, error = winnow("curate", "P", "--filters", "f.yaml", "--out", "A", *given)
    assert status == 0 and out.startswith("4 of 12 samples"), error


def test_what_a_run_replaces_is_said(winnow, shards, tmp_path):
    """A subset changed under its old name, by `plan` and at the start of the step; an unchanged one is not named."""
    recipe = {"pool": str(shards), "subsets": {"a": {"random": {"fraction": 0.5}}, "b": {}}}
    change = ("--set", "subsets.a.random.fraction=0.9")
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    run = ("r.yaml", "--out", "out")
    status, out, err = winnow("run", *run, "--until", "curate")
    assert status == 0 and "replac" not in out + err
    before = np.load(tmp_path / "out" / "subsets" / "a" / "subset.npy")
    assert "1 of 2 units to do, replacing the earlier a\n" in winnow("plan", *run, *change)[1]
    assert np.array_equal(np.load(tmp_path / "out" / "subsets" / "a" / "subset.npy"), before)
    assert winnow("run", *run, *change, "--until", "curate")[0] == 0
    events = map(json.loads, (tmp_path / "out" / "log.jsonl").read_text().splitlines())
    replaced = [(event["stage"], event["units"]) for event in events if event["event"] == "replace"]
    assert replaced == [("curate", ["a"])]
