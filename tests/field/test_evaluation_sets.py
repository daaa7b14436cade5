"""Reports about evaluation sets; tests/field/README.md names them."""

import gzip
import io
import json
import shutil
from pathlib import Path

import numpy as np
import open_clip
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from tests.drawing import COLORS, write_tar
from tests.evaluate.sets import CONFIG, classification_samples, write_classification, write_retrieval
from tests.field.helpers import jpeg, winnow
from winnow.evaluate.sets.files import open_set
from winnow.evaluate.sets.layout import find_tasks

CLASSNAMES, TEMPLATES = "classnames.txt", "zeroshot_classification_templates.txt"


@pytest.fixture(scope="module")
def spec(tmp_path_factory):
    """The spec of a tiny CLIP of known weights."""
    folder = tmp_path_factory.mktemp("clip")
    (folder / "tiny.json").write_text(json.dumps(CONFIG))
    torch.manual_seed(3)
    vision = open_clip.model.CLIPVisionCfg(**CONFIG["vision_cfg"])
    text = open_clip.model.CLIPTextCfg(**CONFIG["text_cfg"])
    model = open_clip.model.CLIP(CONFIG["embed_dim"], vision, text).eval()
    torch.save(model.state_dict(), folder / "tiny.pt")
    return f"{folder / 'tiny.json'}:{folder / 'tiny.pt'}"


@pytest.fixture
def evaluate(spec, tmp_path):
    """Evaluate the tiny CLIP on `data`; the exit status, what was printed, and the scores by metric."""

    def call(*more):
        args = ("evaluate", spec, "--data", tmp_path / "data", "--out", tmp_path / "out", "--executor", "serial")
        status, printed = winnow(*args, *more)
        scores = pq.read_table(tmp_path / "out" / "scores.parquet").to_pylist() if status == 0 else []
        return status, printed, {row["metric"]: row for row in scores}

    return call


@pytest.fixture
def colors(tmp_path):
    return write_classification(tmp_path / "data")


@pytest.fixture(scope="module")
def plain(spec, tmp_path_factory):
    """The scores on the set as it should be."""
    folder = tmp_path_factory.mktemp("plain")
    write_classification(folder / "data")
    args = ("evaluate", spec, "--data", folder / "data", "--out", folder / "out", "--executor", "serial")
    assert winnow(*args)[0] == 0
    return {row["metric"]: row for row in pq.read_table(folder / "out" / "scores.parquet").to_pylist()}


def line_ends(root):
    for name in (CLASSNAMES, TEMPLATES):
        (root / name).write_bytes(b"\xef\xbb\xbf" + (root / name).read_bytes().replace(b"\n", b"\r\n"))


def labels_with_line_ends(root):
    for shard in range(2):
        samples = classification_samples(30)[shard::2]
        for item in samples:
            item["members"]["cls"] += b"\n"
        write_tar(root / "test" / f"{shard}.tar", samples)


def spare_shard(root):
    shutil.copy(root / "test" / "0.tar", root / "test" / "7.tar")


@pytest.mark.parametrize("change", [line_ends, labels_with_line_ends, spare_shard])
def test_differences_that_make_no_difference(evaluate, colors, plain, change):
    change(colors)
    status, printed, scores = evaluate()
    assert status == 0, printed
    assert {name: row["value"] for name, row in scores.items()} == {name: row["value"] for name, row in plain.items()}


def test_the_templates_and_names_of_the_set_itself_are_used(evaluate, colors, spec):
    templates = ["an oil painting of the {c} thing", "{c}, seen from far away"]
    (colors / TEMPLATES).write_text("\n".join(templates) + "\n")
    names = ["owl", "steam engine", "river", "a bowl of soup", "chess", "mountain"]
    (colors / CLASSNAMES).write_text("\n".join(names) + "\n")
    status, printed, scores = evaluate()
    assert status == 0, printed
    model, transform, tokenizer = load(spec)
    samples = classification_samples(30)
    images = [next(data for ext, data in item["members"].items() if ext != "cls") for item in samples]
    labels = np.array([int(item["members"]["cls"]) for item in samples])
    with torch.no_grad():
        shown = torch.stack([transform(Image.open(io.BytesIO(image)).convert("RGB")) for image in images])
        a = model.encode_image(shown, normalize=True)
        classes = []
        for name in names:
            prompts = tokenizer([template.format(c=name) for template in templates])
            classes.append(model.encode_text(prompts, normalize=True).mean(0))
    b = torch.nn.functional.normalize(torch.stack(classes), dim=-1)
    expected = ((a @ b.T).argmax(1).numpy() == labels).mean()
    assert scores["acc1"]["value"] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda root: (root / "test" / "nshards.txt").unlink(), "nshards.txt"),
        (lambda root: (root / "test" / "nshards.txt").write_text("3"), "2.tar"),
        (lambda root: (root / "test" / "1.tar").unlink(), "1.tar"),
        (lambda root: (root / CLASSNAMES).write_text("red\ngreen\n"), "2 classes"),
        (lambda root: (root / TEMPLATES).unlink(), TEMPLATES),
        (lambda root: (root / TEMPLATES).write_text("a photo\n"), "{c}"),
        (
            lambda root: (root / "test" / "0.tar").write_bytes(gzip.compress((root / "test" / "0.tar").read_bytes())),
            "compressed",
        ),
    ],
    ids=["no count", "count too high", "shard missing", "label too high", "no templates", "no place", "gzip"],
)
def test_a_set_that_is_not_whole_is_refused_by_name(evaluate, colors, change, words):
    change(colors)
    status, printed, _ = evaluate()
    assert status == 1 and words in printed


def test_a_set_without_a_train_split_is_no_set_for_linear_probes(evaluate, colors):
    status, printed, _ = evaluate("--protocols", "linear_probe")
    assert status == 2 and "train" in printed


def test_labels_that_are_no_whole_numbers_are_refused(evaluate, colors):
    samples = classification_samples(30)
    samples[0]["members"]["cls"] += b".5"
    write_tar(colors / "test" / "0.tar", samples)
    status, printed, _ = evaluate()
    assert status == 1 and "whole number" in printed


def test_an_image_that_cannot_be_decoded_is_left_out_and_reported(evaluate, colors):
    samples = classification_samples(30)[::2]
    ext = next(ext for ext in samples[3]["members"] if ext != "cls")
    samples[3]["members"][ext] = samples[3]["members"][ext][:40]
    write_tar(colors / "test" / "0.tar", samples)
    status, printed, scores = evaluate()
    assert status == 0 and "left out" in printed
    assert scores["acc1"]["n"] == 29
    assert evaluate("--max-skipped", 0)[0] == 1


def load(spec):
    """The network of a spec, its transform and its tokenizer, by open_clip alone."""
    config, weights = spec.split(":")
    values = json.loads(Path(config).read_text())
    vision = open_clip.model.CLIPVisionCfg(**values["vision_cfg"])
    text = open_clip.model.CLIPTextCfg(**values["text_cfg"])
    model = open_clip.model.CLIP(values["embed_dim"], vision, text).eval()
    model.load_state_dict(torch.load(weights, weights_only=True))
    transform = open_clip.image_transform(values["vision_cfg"]["image_size"], is_train=False)
    return model, transform, open_clip.SimpleTokenizer(context_length=values["text_cfg"]["context_length"])


def recalls(spec, images, captions):
    """Recall@1 of images for texts and of texts for images, computed with open_clip alone."""
    model, transform, tokenizer = load(spec)
    owner = np.repeat(np.arange(len(images)), [len(texts) for texts in captions])
    with torch.no_grad():
        shown = torch.stack([transform(Image.open(image).convert("RGB")) for image in images])
        a = model.encode_image(shown, normalize=True)
        b = model.encode_text(tokenizer([text for texts in captions for text in texts]), normalize=True)
        scores = (b @ a.T).numpy()
    image = float((scores.argmax(1) == owner).mean())
    texts = float((owner[scores.argmax(0)] == np.arange(len(images))).mean())
    return image, texts


def test_recall_counts_every_caption_of_an_image(evaluate, tmp_path, spec):
    """Also where blank lines lie between them."""
    root = write_retrieval(tmp_path / "data")
    captions = [[f"caption {i} {j} of a thing" for j in range(1 + i % 3)] for i in range(6)]
    images = []
    samples = []
    for i, texts in enumerate(captions):
        (tmp_path / f"{i}.jpg").write_bytes(jpeg(i, (40, 40)))
        images.append(tmp_path / f"{i}.jpg")
        members = {"jpg": images[-1].read_bytes(), "txt": ("\n\n".join(texts) + "\n \n").encode()}
        samples.append({"key": f"s{i}", "members": members})
    write_tar(root / "test" / "0.tar", samples)
    status, printed, scores = evaluate()
    assert status == 0, printed
    assert scores["image_retrieval_recall@1"]["n"] == sum(map(len, captions))
    expected = recalls(spec, images, captions)
    assert scores["image_retrieval_recall@1"]["value"] == pytest.approx(expected[0])
    assert scores["text_retrieval_recall@1"]["value"] == pytest.approx(expected[1])


def test_an_image_of_a_retrieval_set_without_captions_is_refused(evaluate, tmp_path):
    root = write_retrieval(tmp_path / "data")
    write_tar(root / "test" / "0.tar", [{"key": "s0", "members": {"jpg": jpeg(0), "txt": b"\n"}}])
    status, printed, _ = evaluate()
    assert status == 1 and "captions" in printed


CLEVR = ["very nearby", "nearby", "near", "", "distant", "very distant"]


def accuracy(spec, samples, names, templates):
    """Top-1 accuracy over the samples of a set with these classes and prompts, computed with open_clip alone."""
    model, transform, tokenizer = load(spec)
    images = [next(data for ext, data in item["members"].items() if ext != "cls") for item in samples]
    labels = np.array([int(item["members"]["cls"]) for item in samples])
    with torch.no_grad():
        shown = torch.stack([transform(Image.open(io.BytesIO(image)).convert("RGB")) for image in images])
        a = model.encode_image(shown, normalize=True)
        prompts = [tokenizer([template.format(c=name) for template in templates]) for name in names]
        b = torch.stack([model.encode_text(texts, normalize=True).mean(0) for texts in prompts])
    return float(((a @ torch.nn.functional.normalize(b, dim=-1).T).argmax(1).numpy() == labels).mean())


def test_a_class_without_a_name_keeps_its_label(evaluate, tmp_path, spec):
    """CLEVR's distances as published: the fourth of six names is empty, and no later name moves up."""
    root = write_classification(tmp_path / "data", "wds_vtab-clevr_closest_object_distance_test", names=CLEVR)
    status, printed, scores = evaluate()
    assert status == 0, printed
    expected = accuracy(spec, classification_samples(30), CLEVR, (root / TEMPLATES).read_text().splitlines())
    assert scores["acc1"]["value"] == pytest.approx(expected) and scores["acc1"]["n"] == 30
    assert "no name for class 3" in winnow("evaluate", "--check", "--data", tmp_path / "data")[1]


@pytest.mark.parametrize("last", ["", "mountain"])
def test_empty_lines_at_the_end_are_classes_only_where_the_task_has_room_for_them(tmp_path, last):
    """CLEVR has six: with an empty sixth name five line ends follow five names; without a task they are no classes."""
    names = [*CLEVR[:5], last]
    for folder in ("wds_vtab-clevr_closest_object_distance_test", "wds_mine_test"):
        root = write_classification(tmp_path, folder, names=CLEVR)
        (root / CLASSNAMES).write_text("".join(f"{name}\n" for name in names) + "\n\n")
    found = {entry.task.key: open_set(entry.task, entry.url) for entry in find_tasks(str(tmp_path))}
    assert found["vtab/clevr_closest_object_distance"].classnames == tuple(names)
    assert found["mine"].classnames == tuple(names if last else names[:5])


def test_blank_lines_between_templates_make_no_difference(evaluate, colors, plain):
    (colors / TEMPLATES).write_text("\n" + (colors / TEMPLATES).read_text().replace("\n", "\n \n") + "\n")
    status, printed, scores = evaluate()
    assert status == 0, printed
    assert {name: row["value"] for name, row in scores.items()} == {name: row["value"] for name, row in plain.items()}


def test_lines_end_at_line_ends_alone(evaluate, tmp_path, spec):
    """Not at the characters where `str.splitlines` splits as well."""
    odd = "\u2028\u2029\x85\x0b\x0c\x1c\x1d\x1e"
    root = write_retrieval(tmp_path / "data", n=len(odd))
    texts = [f"caption {i}{mark}still the same" for i, mark in enumerate(odd)]
    members = [{"jpg": jpeg(i), "txt": text.encode()} for i, text in enumerate(texts)]
    write_tar(root / "test" / "0.tar", [{"key": f"s{i}", "members": item} for i, item in enumerate(members)])
    names = [f"{name}{mark}ish" for name, mark in zip(COLORS, odd, strict=False)]
    colors = write_classification(tmp_path / "data")
    (colors / CLASSNAMES).write_text("\r\n".join(names), encoding="utf-8", newline="")
    status, printed, scores = evaluate()
    assert status == 0, printed
    assert scores["image_retrieval_recall@1"]["n"] == len(odd)
    expected = accuracy(spec, classification_samples(30), names, (colors / TEMPLATES).read_text().splitlines())
    assert scores["acc1"]["value"] == pytest.approx(expected)


def test_shards_beyond_the_count_are_named(evaluate, colors, tmp_path):
    spare_shard(colors)
    status, printed, scores = evaluate()
    assert status == 0 and scores["acc1"]["n"] == 30
    assert "not read: colors, 7.tar" in printed
    assert "not read, as nshards.txt counts 2: 7.tar" in winnow("evaluate", "--check", "--data", tmp_path / "data")[1]


def test_an_extension_begins_at_the_first_dot(evaluate, colors):
    """As for webdataset, whose `to_tuple` finds no `jpg` in a sample with `input.jpg`."""
    write_tar(colors / "test" / "0.tar", [{"key": "s0", "members": {"input.jpg": jpeg(0), "cls": b"0"}}])
    status, printed, _ = evaluate()
    assert status == 1 and "sample s0: no image (it has .input.jpg, .cls)" in printed
