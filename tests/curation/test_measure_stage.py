"""The measure stage: values against direct computation, images decoded once, columns kept apart."""

import io
import json
from dataclasses import replace
from typing import ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import winnow.curation.measures.stage
from tests.curation.tables import embeddings
from tests.drawing import sample, write_tar
from tests.evaluate.sets import CONFIG, write_config
from tests.examples.brightness import Brightness
from winnow.curation.columns.table import View
from winnow.curation.measures import MEASURES
from winnow.curation.measures.base import Measure, MeasureSpec, Samples, check_fields, make, with_upstream
from winnow.curation.measures.caption import Caption
from winnow.curation.measures.clip import Clip
from winnow.curation.measures.language import Language
from winnow.curation.measures.nsfw import Nsfw
from winnow.curation.measures.stage import MeasureStage
from winnow.infra.errors import WinnowError
from winnow.infra.io.arrow import as_matrix
from winnow.infra.params import build, params
from winnow.infra.pool.index import IndexStage
from winnow.infra.pool.pool import Pool
from winnow.infra.stages.executors import SerialExecutor
from winnow.infra.stages.runner import Budget, execute
from winnow.pretrain.encoder import encoder_digest, load_encoder
from winnow.pretrain.models.open_clip import build_model


def measure(pool, measures, out, **options):
    return execute(MeasureStage(pool, measures, str(out)), SerialExecutor(), **options)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    spec = write_config(tmp_path_factory.mktemp("encoder"))
    return Clip(spec, encoder_digest(spec), device="cpu")


@pytest.mark.parametrize("tower", ["visual.proj", "text_projection"])
def test_an_encoder_with_weights_that_are_not_finite_is_refused(small_pool, tmp_path, tower):
    import torch

    spec = write_config(tmp_path)
    state = build_model(CONFIG).state_dict()
    torch.save(state | {tower: torch.full_like(state[tower], float("nan"))}, tmp_path / "nan.pt")
    spec = f"{spec.rpartition(':')[0]}:{tmp_path}/nan.pt"
    samples = Samples(pa.table({"text": ["a"], "clip.image": embeddings(np.eye(1, 8))}), [Image.new("RGB", (9, 9))])
    with pytest.raises(WinnowError, match="features are not finite"):
        Clip(spec, encoder_digest(spec), device="cpu").compute(samples)
    if tower == "text_projection":
        with pytest.raises(WinnowError, match="features are not finite, for 6 of 6 prompts"):
            Nsfw(encoder=spec, digest=encoder_digest(spec)).compute(samples)


def test_the_fields_of_measures_are_those_of_their_schemas(clip):
    for name in MEASURES.names():
        kind = MEASURES.load(name)
        made = clip if name == "clip" else build(kind, dict(kind.example), name)
        assert set(made.fields()) == set(made.schema().names), name


def test_a_column_that_its_measure_has_not_is_refused(small_pool, clip, tmp_path):
    specs = with_upstream(["clip", "caption"], {"clip": MeasureSpec("clip", Clip, {"encoder": "x"})})
    check_fields(["clip.score", "caption.words", "text", "other.score"], specs)
    for column, words in (("clip.img", "clip.image"), ("caption.score", "caption.words, caption.characters")):
        with pytest.raises(WinnowError, match=f"has no column .*It has: .*{words}"):
            check_fields([column], specs)
    measure(small_pool, (Caption(),), tmp_path)
    with pytest.raises(WinnowError, match=r'no column "caption.score".*caption.words, caption.characters'):
        View(Pool.open(small_pool), str(tmp_path)).check(["caption.score"])


def test_clip_columns_are_the_embeddings_of_the_encoder(small_pool, clip, tmp_path):
    measure(small_pool, (clip,), tmp_path)
    pool, encoder = Pool.open(small_pool), load_encoder(clip.encoder, device="cpu")
    view = View(pool, str(tmp_path))
    for shard, batch in zip(pool.shards, view.batches(["clip.image", "clip.text", "clip.score"]), strict=True):
        table = shard.table()
        import torch

        images = [Image.open(io.BytesIO(data)).convert("RGB") for data in shard.image_bytes(table)]
        image = encoder.encode_images(torch.stack([encoder.preprocess(image) for image in images]))
        text = encoder.encode_texts(table["text"].to_pylist())
        assert np.allclose(as_matrix(batch["clip.image"])[0], image, atol=1e-3)
        assert np.allclose(as_matrix(batch["clip.text"])[0], text, atol=1e-3)
        assert np.allclose(batch["clip.score"].to_numpy(), (image * text).sum(1), atol=1e-5)
        assert batch["clip.image"].type.value_type == "halffloat"


def test_each_image_is_decoded_once(small_pool, clip, tmp_path, monkeypatch):
    count = []
    decode = winnow.curation.measures.stage.decode_image
    monkeypatch.setattr(winnow.curation.measures.stage, "decode_image", lambda data: count.append(1) or decode(data))
    measure(small_pool, (clip, Brightness(), Caption()), tmp_path)
    assert len(count) == len(Pool.open(small_pool))
    measure(small_pool, (clip, Brightness(), Caption(), Language()), tmp_path)
    assert len(count) == len(Pool.open(small_pool))  # a text measure more decodes nothing


def test_other_columns_are_left_unchanged(small_pool, tmp_path):
    first = measure(small_pool, (Caption(),), tmp_path)
    both = measure(small_pool, (Caption(), Brightness()), tmp_path)
    digest = first.values["digests"][first.values["columns"]["caption"]]
    assert both.values["digests"][both.values["columns"]["caption"]] == digest
    view = View(Pool.open(small_pool), str(tmp_path))
    before = view.digest(["caption.words"])
    measure(small_pool, (Caption(),), tmp_path)
    assert view.digest(["caption.words"]) == before


def test_an_undecodable_image_is_null_and_skipped(tmp_path, clip):
    samples = [sample(i) for i in range(4)]
    whole = samples[2]["members"]["jpg"]
    samples[2]["members"]["jpg"] = whole[:-60]  # its header is good
    write_tar(tmp_path / "shards" / "0.tar", samples)
    execute(IndexStage((str(tmp_path / "shards"),), str(tmp_path / "pool")), SerialExecutor())
    manifest = measure(str(tmp_path / "pool"), (clip, Caption()), tmp_path / "columns", budget=Budget(0.3))
    assert manifest.skipped["reasons"] == {"undecodable image": 1}
    view = View(Pool.open(str(tmp_path / "pool")), str(tmp_path / "columns"))
    batch = next(view.batches(["clip.score", "clip.image", "caption.words"]))
    assert [value is None for value in batch["clip.score"].to_pylist()] == [False, False, True, False]
    assert batch["clip.image"].null_count == 1 and batch["caption.words"].null_count == 0
    with pytest.raises(WinnowError, match="undecodable image: 1"):
        measure(str(tmp_path / "pool"), (Brightness(),), tmp_path / "strict", budget=Budget(0))


def test_a_column_not_measured_names_its_measure(small_pool, tmp_path):
    measure(small_pool, (Caption(),), tmp_path)
    view = View(Pool.open(small_pool), str(tmp_path))
    with pytest.raises(WinnowError, match=r'column "language\.code" has not been measured.*measure `language`'):
        view.check(["language.code"])
    with pytest.raises(WinnowError, match=r'no column "clip_l14_similarity_score".*A measure provides it: clip'):
        view.check(["clip_l14_similarity_score"])


@pytest.mark.parametrize("name", MEASURES.names())
def test_registered_measures_hold_the_contract(name, small_pool, tmp_path, clip):
    kind = MEASURES.load(name)
    np.save(tmp_path / "head.npy", np.ones(16))
    given = {"head": str(tmp_path / "head.npy")} if name == "aesthetic" else {}
    made = clip if name == "clip" else make(MeasureSpec(name, kind, given), lambda: (clip.encoder, clip.digest))
    assert kind.name == name and kind.summary and kind.__doc__
    manifest = measure(small_pool, (made, clip) if made.upstream() else (made,), tmp_path / "columns")
    for shard in Pool.open(small_pool).shards:
        table = pq.read_table(tmp_path / "columns" / manifest.values["columns"][name] / f"{shard.name}.parquet")
        assert table.schema.equals(made.schema()) and table.num_rows == shard.rows


@params
class Url(Measure):
    """`url.path`, from the member `json`."""

    name: ClassVar[str] = "url"
    version: ClassVar[int] = 1
    members: ClassVar[bool] = True

    def schema(self):
        return pa.schema([("path", pa.string())])

    def compute(self, samples):
        return pa.table([[json.loads(data)["url"] for data in samples.members("json")]], schema=self.schema())


def test_a_measure_reads_other_members(small_pool, tmp_path):
    measure(small_pool, (Url(), Brightness()), tmp_path)
    view = View(Pool.open(small_pool), str(tmp_path))
    found = [url for batch in view.batches(["url.path"]) for url in batch["url.path"].to_pylist()]
    assert found == [f"https://example.com/{i}.jpg" for i in range(24)]
    with pytest.raises(ValueError, match="members = True"):
        Samples(pa.table({"uid": ["a"]})).members("json")


def test_setup_loads_what_the_units_share(small_pool, clip, tmp_path, monkeypatch):
    loaded = []
    monkeypatch.setattr("winnow.pretrain.encoder.load_encoder", lambda spec, **_: loaded.append(spec))
    stage = MeasureStage(small_pool, (clip, Brightness()), str(tmp_path))
    stage.setup()
    assert loaded == [clip.encoder]
    assert stage.resources.gpus == 0 and replace(clip, device="auto").resources.gpu_optional
