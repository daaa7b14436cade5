"""`import winnow`: what is exported, that it is lazy and typed, and the page that shows it."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

import winnow
from tests.drawing import write_pool
from tests.evaluate.sets import write_classification, write_config
from winnow.curation.filters import FILTERS

ROOT = Path(__file__).resolve().parents[1]


def test_importing_is_lazy_and_every_name_is_there():
    code = "import sys, winnow; print(sorted(name for name in sys.modules if name.startswith('winnow.')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"
    assert set(winnow.__all__) <= set(dir(winnow))
    for name in winnow.__all__:
        assert getattr(winnow, name).__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        winnow.nothing  # noqa: B018


def test_every_filter_is_exported():
    for name in FILTERS.names():
        kind = FILTERS.load(name)
        assert getattr(winnow, kind.__name__) is kind


def test_type_checkers_see_what_is_exported(tmp_path):
    """The names under TYPE_CHECKING are those of `__all__`, each from the module it is loaded from."""
    text = (ROOT / "winnow" / "__init__.py").read_text()
    block = text.partition("if TYPE_CHECKING:\n")[2].partition("\n__version__")[0]
    found = {}
    for module, names in re.findall(r"from (\S+) import \(?([\w,\s]+?)\)?\n(?=    from|\n|$)", block + "\n"):
        found |= {name.strip(): module for name in names.split(",") if name.strip()}
    assert found == winnow._MODULES and set(found) == set(winnow.__all__)


@pytest.fixture
def table():
    rng = np.random.default_rng(0)
    scores = rng.normal(size=100)
    return pa.table({"uid": [f"{i:032x}" for i in range(100)], "clip.score": scores, "other": rng.normal(size=100)})


def test_a_tree_on_a_table_and_on_a_data_frame(table):
    tree = winnow.ClipScore(fraction=0.4) & ~winnow.RandomFraction(fraction=0.5)
    scores = table["clip.score"].to_numpy()
    kept = winnow.apply(tree, table)
    assert set(kept["clip.score"].to_pylist()) <= set(np.sort(scores)[::-1][:41])
    frame = winnow.apply(tree, table.to_pandas())
    assert frame["uid"].tolist() == kept["uid"].to_pylist() and frame.shape[1] == 3


def test_survivors_are_those_of_the_filters_before(table):
    first = winnow.ClipScore(fraction=0.4)
    then = winnow.ClipScore(fraction=0.5, of="survivors")
    scores = np.sort(table["clip.score"].to_numpy())[::-1]
    expected = scores[:41][scores[:41] >= scores[:41][int(41 * 0.5)]]
    assert np.array_equal(np.sort(winnow.apply(first & then, table)["clip.score"].to_numpy())[::-1], expected)


def test_what_was_fitted_is_applied_to_other_rows(table):
    fitted = winnow.fit(winnow.ClipScore(fraction=0.4), table)
    (facts,) = fitted.facts.values()
    other = pa.table({"clip.score": [facts["threshold"], facts["threshold"] - 1e-6, None]})
    assert fitted.mask(other).tolist() == [True, False, False]


def test_what_cannot_be_applied_is_refused(table):
    with pytest.raises(winnow.UsageError, match=r'no column "clip\.score".*other'):
        winnow.apply(winnow.ClipScore(fraction=0.4), table.drop(["clip.score"]))
    with pytest.raises(winnow.UsageError, match="target set"):
        winnow.fit(winnow.parse_filters({"image_cluster": {"target": "x", "clusters": 3}}), table)
    with pytest.raises(winnow.UsageError, match="a pyarrow Table or a pandas DataFrame"):
        winnow.apply(winnow.ClipScore(fraction=0.4), [1, 2])


def test_embedding_images_and_texts(tmp_path):
    spec = write_config(tmp_path)
    images = [Image.new("RGB", (40, 30), color) for color in ("red", "blue", "green")]
    encoder = winnow.load_encoder(spec, device="cpu")
    batch = winnow.embed(encoder, images=images)
    assert batch.shape == (3, encoder.dim) and np.allclose(np.linalg.norm(batch, axis=1), 1, atol=1e-5)
    assert np.allclose(winnow.embed(spec, images=images[:1]), batch[:1], atol=1e-5)
    assert winnow.embed(encoder, texts=["a cup"]).shape == (1, encoder.dim)
    assert winnow.embed(encoder, images=[]).shape == (0, encoder.dim)
    with pytest.raises(ValueError, match="either images or texts"):
        winnow.embed(encoder)


def test_the_page_runs_as_written(tmp_path, monkeypatch):
    """Its blocks, one after the other in one namespace, on small inputs with the names that it uses."""
    page = (ROOT / "docs" / "python.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    write_pool(tmp_path / "shards", shards=2, per_shard=8)
    write_classification(tmp_path / "evalsets", n=12)
    (tmp_path / "tiny").mkdir()
    spec = write_config(tmp_path / "tiny")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec("\n".join(blocks).replace("ViT-B-32:openai", spec), names)
    assert 0 < len(names["kept"]) < len(names["table"])
    assert names["vectors"].shape[0] == 2 and names["scores"].num_rows
