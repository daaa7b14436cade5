"""Reports about captions; tests/field/README.md names them."""

import numpy as np
import open_clip
import pyarrow.parquet as pq
import pytest
import torch

from tests.evaluate.sets import CONFIG, write_config
from tests.field.helpers import index, jpeg, measure, pairs, pairs_of, sample, truth, winnow, write_tar

CAPTIONS = {
    "two lines": "this is a photo of a brown dog\nwho sits in the park near some trees",
    "line separator": "this is a photo of a dog\u2028and of the cat that it likes",
    "carriage return": "this is a photo of a dog\r\nand of the cat that it likes",
    "emoji": "a 😀👩‍👩‍👧 family and their dogs in the park",
    "decomposed": "e\u0301a\u0300 accents in pieces in a sentence of English words",
    "tabs": "a photo\tof a dog\tand of the cat that it likes",
    "long": "a very long caption of a dog " * 400,
    "French": "Ceci est une photo\nd'un chien brun assis dans le parc",
    "Japanese": "これは日本語の文章です",
}


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    members = [member for i, text in enumerate(CAPTIONS.values()) for member in sample(str(i), i, text)]
    write_tar(folder / "shards" / "0.tar", members)
    index(folder / "shards", folder / "pool", budget=0)
    return folder / "pool"


def test_captions_come_out_as_they_went_in(pool, tmp_path):
    assert pairs(pool, tmp_path / "again") == {text: jpeg(i) for i, text in enumerate(CAPTIONS.values())}


def test_a_caption_of_several_lines_has_one_language(pool, tmp_path):
    values = measure(pool, tmp_path / "out", "language,caption")
    assert len(values) == len(CAPTIONS)
    for name, text in CAPTIONS.items():
        expected = {"French": "fr", "Japanese": "ja"}.get(name, "en")
        assert values[text]["code"] == expected, name
        assert values[text]["characters"] == len(text)
        assert values[text]["words"] == len(text.split())


def test_long_captions_are_cut_as_open_clip_cuts_them(pool, tmp_path):
    spec = write_config(tmp_path)
    status, printed = winnow(
        "measure", pool, "--out", tmp_path, "--measures", "clip", "--scorer", spec, "--executor", "serial"
    )
    assert status == 0, printed
    (file,) = (tmp_path / "columns").glob("clip*/*.parquet")
    table = pq.read_table(file)
    texts = np.array(table["text"].to_pylist(), np.float32)
    assert np.isfinite(texts).all() and np.isfinite(np.array(table["score"])).all()
    # What open_clip's tokenizer leaves of a long caption is what it leaves of its beginning.
    tokenizer = open_clip.SimpleTokenizer(context_length=CONFIG["text_cfg"]["context_length"])
    long = CAPTIONS["long"]
    assert torch.equal(tokenizer([long]), tokenizer([long[:200]]))
    assert np.linalg.norm(texts[list(CAPTIONS).index("long")]) == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("data", ["caf\u00e9".encode("latin-1"), "cafe".encode("utf-16"), b"it\x92s"])
def test_a_caption_that_is_not_utf8_costs_itself_alone(tmp_path, data):
    found, skipped = pairs_of(tmp_path, [*sample("0", 0, data), *sample("1", 1)])
    assert found == truth(1)
    assert skipped == 1


def test_an_image_without_a_caption_is_skipped_unless_asked_for(tmp_path):
    write_tar(tmp_path / "shards" / "0.tar", [("0.jpg", jpeg(0)), *sample("1", 1)])
    manifest = index(tmp_path / "shards", tmp_path / "pool")
    assert (manifest["items"], manifest["skipped"]["count"]) == (1, 1)
    args = ("index", tmp_path / "shards", "--out", tmp_path / "images", "--no-captions", "--executor", "serial")
    status, printed = winnow(*args)
    assert status == 0 and "2 samples" in printed


def test_a_caption_that_json_says_is_null_is_no_caption(tmp_path):
    members = [("0.jpg", jpeg(0)), ("0.json", b'{"caption": null, "uid": null, "text": null}'), *sample("1", 1)]
    found, skipped = pairs_of(tmp_path, members)
    assert found == truth(1)
    assert skipped == 1


def test_an_empty_caption_is_kept_as_one_and_dropped_by_the_basic_filter(tmp_path):
    found, skipped = pairs_of(tmp_path, [*sample("0", 0, ""), *sample("1", 1)])
    assert found == {"": jpeg(0)} | truth(1) and not skipped
    values = measure(tmp_path / "pool", tmp_path / "out", "caption")
    assert (values[""]["words"], values[""]["characters"]) == (0, 0)
