"""`winnow curate` on DataComp's metadata, as a user calls it."""

import json
import math
import re
import subprocess
import sys

import numpy as np
import pytest
import yaml

from tests.benchmarks.metadata import write_metadata
from tests.field.helpers import curate as curate_small
from tests.field.helpers import write_metadata as write_small
from winnow.infra.pool.pool import Pool
from winnow.infra.pool.uids import encode_uids, load_subset
from winnow.pipeline.cli import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Metadata of 600 samples in DataComp's schema, with features of 8 dimensions."""
    folder = write_metadata(tmp_path_factory.mktemp("datacomp") / "metadata", 600, per_file=250)
    rng = np.random.default_rng(0)
    for shard in Pool.open(str(folder)).shards:
        vectors = rng.normal(size=(shard.rows, 8))
        vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)
        np.savez(folder / f"{shard.name}.npz", l14_img=vectors, l14_txt=vectors)
    np.save(folder.parent / "centroids.npy", rng.normal(size=(20, 8)).astype(np.float32))
    np.save(folder.parent / "target.npy", rng.normal(size=(5, 8)).astype(np.float32))
    np.save(folder.parent / "wide.npy", rng.normal(size=(5, 9)).astype(np.float32))
    np.save(folder.parent / "empty.npy", np.empty((0, 8), np.float32))
    return folder


@pytest.fixture
def curate(folder, tmp_path, monkeypatch, capsys):
    """Run `winnow curate` with a tree; returns (status, stdout, stderr, output folder)."""

    def call(tree, *more, out="out"):
        (tmp_path / "filters.yaml").write_text(yaml.safe_dump(tree))
        args = [
            "curate",
            folder,
            "--filters",
            tmp_path / "filters.yaml",
            "--out",
            tmp_path / out,
            "--executor",
            "serial",
        ]
        monkeypatch.setattr(sys, "argv", ["winnow", *map(str, (*args, *more))])
        with pytest.raises(SystemExit) as status:
            main()
        captured = capsys.readouterr()
        return status.value.code or 0, captured.out, captured.err, tmp_path / out

    return call


def column(folder, name):
    return np.concatenate([table[name].to_numpy() for _, table in Pool.open(str(folder)).tables((name,))])


def test_fraction_of_the_survivors_budget_and_funnel(curate, folder):
    tree = {
        "all": [
            {"clip_score": {"model": "b32", "fraction": 0.5}},
            {"clip_score": {"model": "l14", "fraction": 0.2, "of": "survivors"}},
        ]
    }
    status, out, _, made = curate(tree, "--explain", "--reasons")
    assert status == 0
    b32, l14 = column(folder, "clip_b32_similarity_score"), column(folder, "clip_l14_similarity_score")
    first = b32 >= np.sort(b32)[::-1][300]
    among = np.sort(l14[first])[::-1]
    mask = first & (l14 >= among[int(len(among) * 0.2)])
    uids = column(folder, "uid")[mask]
    kept = load_subset(str(made / "subset.npy"))
    assert sorted(encode_uids(kept)) == sorted(uids)
    funnel = json.loads((made / "funnel.json").read_text())
    assert funnel["kept"] == mask.sum() and funnel["pool"] == 600
    assert [child["kept"] for child in funnel["tree"]["children"]] == [
        first.sum(),
        (l14 >= among[int(len(among) * 0.2)]).sum(),
    ]
    assert f"{mask.sum()} of 600 samples" in out and "by it alone" in out
    assert re.search(r"clip_score\(fraction=0.5, model='b32'\): threshold = 0\.\d+, fitted in \d+\.\d\d s", out)
    assert (made / "manifest.json").exists() and (made / "reasons.parquet").exists()
    # a budget beneath a weighted score
    status, _, _, made = curate({"score": {"b32": 0.5, "l14": 0.5, "keep": 100}}, out="budget")
    assert status == 0 and len(load_subset(str(made / "subset.npy"))) == 100


def test_why_says_which_node_and_with_what_values(curate, folder):
    tree = {
        "all": [
            {"clip_score": {"model": "b32", "threshold": 0.2}},
            {"not": {"clip_score": {"model": "l14", "fraction": 0.1}}},
        ]
    }
    b32, l14, uids = (
        column(folder, name) for name in ("clip_b32_similarity_score", "clip_l14_similarity_score", "uid")
    )
    cut = np.sort(l14)[::-1][60]
    low, high = int(np.argmin(b32)), int(np.argmax(np.where(b32 >= 0.2, l14, -9)))
    assert l14[high] >= cut
    status, out, _, _ = curate(tree, "--why", uids[low])
    assert status == 0
    assert re.search(rf"{uids[low]} is dropped by clip_score\(threshold=0.2, model='b32'\)\.", out)
    assert f"clip_b32_similarity_score = {b32[low]:.6g}" in out
    _, out, _, _ = curate(tree, "--why", uids[high])
    assert "is dropped by ~clip_score(fraction=0.1, model='l14')" in out
    assert f"clip_l14_similarity_score = {l14[high]:.6g}" in out and f"threshold = {cut:.6g}" in out
    fine = int(np.argmax(np.where(l14 < cut, b32, -9)))
    _, out, _, _ = curate(tree, "--why", uids[fine])
    assert f"{uids[fine]} is kept." in out
    status, _, error, _ = curate(tree, "--why", "0" * 32)
    assert status == 1 and "no sample has the uid" in error
    status, _, error, _ = curate(tree, "--why", "zz")
    assert status == 2 and "32" in error


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ({"clip_score": {"fraction": 0.3}}, 'measure "clip" needs images.*`model: b32`'),
        ({"clip_score": {"model": "l14", "fraction": 1.2}}, "fraction must be at most 1, not 1.2"),
        ({"clip_score": {"model": "l14", "fraction": 0}}, "fraction must be greater than 0, not 0"),
        ({"clip_score": {"model": "l14", "fraction": 0.3, "threshold": 0.2}}, "exactly one"),
        ({"image_based": {"centroids": "{}/centroids.npy", "target": "{}/wide.npy"}}, "differ in dimension.*8.*9"),
        ({"image_based": {"centroids": "{}/centroids.npy", "target": "{}/empty.npy"}}, "target set is empty"),
        ({"image_based": {"clusters": 601, "target": "{}/target.npy"}}, "600 samples cannot make 601 clusters"),
        ({"semdedup": {"clusters": 601, "epsilon": 0.1, "column": "l14_img"}}, "600 samples cannot make 601 clusters"),
        ({"image_based": {"target": "{}/nothing.npy", "clusters": 20}}, "nothing.npy"),
        ({"norm_sim": {"target": "{}/wide.npy", "threshold": 0.7, "column": "l14_img"}}, "8 dimensions.* 9"),
        ({"neg_clip_loss": {"model": "b32", "fraction": 0.3}}, 'no.* "?b32_img'),
        ({"aesthetics": {}}, "unknown filter"),
        ({"score": {"caption": 1, "keep": 2}}, 'measure "caption" has no column "score".*caption.words, caption.char'),
        ({"exact_duplicates": {"by": ["text", "caption.char"]}}, 'measure "caption" has no column "char"'),
    ],
)
def test_refused_before_work_with_what_to_do(curate, folder, tree, words):
    status, _, error, made = curate(json.loads(json.dumps(tree).replace("{}/", f"{folder.parent}/")))
    assert status in (1, 2) and re.search(words, error), error
    assert error.count("\n") == 1 and not (made / "subset.npy").exists() and not (made / "work").exists()


def test_nan_scores_never_pass_and_are_counted(curate, folder, tmp_path, monkeypatch):
    import pyarrow as pa
    import pyarrow.parquet as pq

    other = tmp_path / "metadata"
    other.mkdir()
    table = pq.read_table(sorted(folder.glob("*.parquet"))[0])
    scores = table["clip_l14_similarity_score"].to_numpy().copy()
    scores[::3] = math.nan
    table = table.set_column(
        table.column_names.index("clip_l14_similarity_score"), "clip_l14_similarity_score", pa.array(scores)
    )
    pq.write_table(table, other / "0.parquet")
    (tmp_path / "f.yaml").write_text("clip_score: {model: l14, threshold: -5}\n")
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "winnow",
            "curate",
            str(other),
            "--filters",
            str(tmp_path / "f.yaml"),
            "--out",
            str(tmp_path / "o"),
            "--executor",
            "serial",
        ],
    )
    with pytest.raises(SystemExit):
        main()
    funnel = json.loads((tmp_path / "o" / "funnel.json").read_text())
    assert funnel["tree"]["nan"] == len(scores[::3]) and funnel["kept"] == len(scores) - len(scores[::3])


def test_a_custom_filter_is_named_by_module_and_class(curate, folder):
    local = {"tests.examples.caption_length:CaptionLength": {"most": 6}}
    status, _, _, made = curate({"all": [local, {"not": {"random": {"fraction": 0.4}}}]})
    assert status == 0
    short = {
        uid for uid, text in zip(column(folder, "uid"), column(folder, "text"), strict=True) if len(text.split()) <= 6
    }
    kept = set(encode_uids(load_subset(str(made / "subset.npy"))))
    assert kept < short and abs(len(kept) / len(short) - 0.6) < 5 * 0.5 / len(short) ** 0.5


def test_curating_scores_loads_neither_torch_nor_pandas_and_starts_no_ray_for_one_subset(folder, tmp_path):
    (tmp_path / "f.yaml").write_text("clip_score: {model: l14, fraction: 0.3}\n")
    code = (
        "import sys\nfrom winnow.pipeline.cli import main\n"
        f"sys.argv = ['winnow', 'curate', {str(folder)!r}, '--filters', {str(tmp_path / 'f.yaml')!r}, "
        f"'--out', {str(tmp_path / 'o')!r}]\n"
        "try:\n    main()\nfinally:\n    print(sorted({'torch', 'ray', 'pandas', 'faiss'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "[]", done.stdout + done.stderr


@pytest.mark.parametrize(
    "tree",
    [
        {"image_cluster": {"target": "TARGET", "clusters": 4, "column": "l14_img"}},
        {"semdedup": {"clusters": 4, "epsilon": 0.001, "column": "l14_img"}},
        {"cluster_balanced": {"clusters": 4, "fraction": 0.8, "column": "l14_img"}},
        {"near_duplicates": {"cosine": 0.999, "column": "l14_img"}},
        {"neg_clip_loss": {"model": "l14", "keep": 80}},
        {"d2_pruning": {"model": "l14", "keep": 80}},
        {"norm_sim": {"target": "TARGET/t.npy", "threshold": 0.01, "column": "l14_img"}},
        {"image_based": {"target": "TARGET/t.npy", "clusters": 4, "language": None}},
    ],
    ids=lambda tree: next(iter(tree)),
)
def test_features_without_a_value_in_datacomps_metadata(tree, tmp_path):
    """Every tenth embedding is NaN, infinite, or zeros; in the target set too."""
    table = write_small(tmp_path / "pool", "0", [0.3] * 100)
    write_small(tmp_path / "target", "0", [0.3] * 50, first=200)
    for folder, name in ((tmp_path / "pool", "l14_img"), (tmp_path / "target", "l14_img")):
        with np.load(folder / "0.npz") as found:
            arrays = {key: found[key].copy() for key in found}
        arrays[name][::30], arrays[name][10::30], arrays[name][20::30] = math.nan, np.r_[math.inf, [0] * 7], 0
        np.savez(folder / "0.npz", **arrays)
        np.save(folder / "t.npy", arrays[name])
    text = json.dumps(tree).replace("TARGET", str(tmp_path / "target"))
    status, printed, subset = curate_small(tmp_path / "pool", json.loads(text), tmp_path / "out")
    assert status == 0, printed
    broken = set(table["uid"].to_pylist()[::10])
    assert 0 < len(subset) <= 90 and not broken & set(encode_uids(subset))
    funnel = json.loads((tmp_path / "out" / "subset" / "funnel.json").read_text())
    assert funnel["tree"]["nan"] == 10
    if "image_cluster" in tree:
        assert len(subset) == 90


def test_features_that_are_not_normalised_are_refused_by_file(tmp_path):
    write_small(tmp_path / "pool", "0", [0.3] * 20)
    write_small(tmp_path / "pool", "1", [0.3] * 20, first=20)
    with np.load(tmp_path / "pool" / "1.npz") as found:
        np.savez(tmp_path / "pool" / "1.npz", **{key: 5 * found[key] for key in found})
    tree = {"semdedup": {"clusters": 2, "epsilon": 0.1, "column": "l14_img"}}
    status, printed, _ = curate_small(tmp_path / "pool", tree, tmp_path / "out")
    words = r"1.npz: l14_img: 20 of 20 embeddings are not L2-normalised \(norms 5 to 5\). Divide each"
    assert status == 1 and re.search(words, printed), printed
