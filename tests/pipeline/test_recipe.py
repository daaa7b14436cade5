"""Recipes: what is read, what is overridden, and that every mistake is reported with its line and a remedy."""

import pytest

from tests.drawing import write_pool
from winnow.curation.algebra.parse import unparse
from winnow.infra.errors import UsageError
from winnow.pipeline.recipe.load import load_recipe, load_training, parse_recipe

MODEL = (
    "{embed_dim: 32, vision_cfg: {image_size: 32, patch_size: 16, width: 32, layers: 1}, "
    "text_cfg: {width: 32, layers: 1, heads: 2, context_length: 16}}"
)


@pytest.fixture
def text(tmp_path):
    write_pool(tmp_path / "shards", shards=2, per_shard=2)
    (tmp_path / "eval").mkdir()
    return f"""\
pool: {tmp_path}/shards
scorer: {{model: ViT-B-32, pretrained: openai}}
subsets:
  none: {{}}
  best: {{clip_score: {{fraction: 0.3}}}}
  both:
    all:
      - clip_score: {{threshold: 0.2}}
      - image_cluster: {{target: "${{pool}}", clusters: 5}}
pretrain:
  model: {MODEL}
  samples_seen: 64
  batch_size: 8
  warmup_steps: 2
  seeds: [0, 1]
evaluate: {{data: {tmp_path}/eval}}
"""


def read(text, *overrides):
    return parse_recipe(text, "my.yaml", list(overrides))


def test_a_good_recipe(text, tmp_path):
    recipe = read(text)
    assert recipe.pool == (f"{tmp_path}/shards",)
    assert list(recipe.subsets) == ["none", "best", "both"]
    assert recipe.reference == "none"
    assert recipe.targets() == [f"{tmp_path}/shards"]
    assert list(recipe.pool_measures()) == ["clip"]
    assert recipe.pretrain.seeds == (0, 1)
    assert recipe.pretrain.batch_size == 8


def test_overrides(text, tmp_path):
    recipe = read(text, "pretrain.batch_size=16", "subsets.best.clip_score.fraction=0.5", "max_skipped=0.2")
    assert recipe.pretrain.batch_size == 16
    assert unparse(recipe.subsets["best"]) == {"clip_score": {"fraction": 0.5}}
    assert recipe.max_skipped == 0.2
    assert unparse(read(text, "subsets.new={basic: {}}").subsets["new"]) == {"basic": {}}
    write_pool(tmp_path / "other")
    assert read(text, f"pool={tmp_path}/other").targets() == [f"{tmp_path}/other"]  # ${pool} follows


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("scorer:", "scorrer:", 'my.yaml, line 2: unknown key "scorrer". Did you mean "scorer"?'),
        ("samples_seen", "sample_seen", 'my.yaml, line 12: unknown key "sample_seen". Did you mean "samples_seen"?'),
        (
            'clip_score: {threshold',
            'clip_scor: {threshold',
            'my.yaml, line 8: unknown filter "clip_scor". Did you mean "clip_score"?',
        ),
        (
            '{threshold: 0.2}',
            '{treshold: 0.2}',
            'my.yaml, line 8: unknown parameter of clip_score "treshold". Did you mean "threshold"?',
        ),
        ("fraction: 0.3", "fraction: 3", "my.yaml, line 5: clip_score: fraction must be at most 1, not 3"),
        (
            'batch_size: 8',
            'batch_size: many',
            "my.yaml, line 13: pretrain.batch_size must be a whole number, not 'many'.",
        ),
        ("/shards\n", "/nowhere\n", "line 1: "),
        ("/eval}", "/nowhere}", "my.yaml, line 16: "),
        ('"${pool}"', '"${pol}"', '"${pol}" names no value in the recipe'),
        ("  best:", "  none:", 'my.yaml, line 5: "none" is given twice (before in line 4)'),
        ("  best:", "  be st:", 'my.yaml, line 5: subset "be st": a name has letters'),
        ("ViT-B-32", "ViT-B-33", 'my.yaml, line 2: unknown open_clip model "ViT-B-33". Did you mean "ViT-B-32"?'),
        ("openai", "openaj", "my.yaml, line 2: "),
        ("  model: {embed", "  objective: clipp\n  model: {embed", 'unknown objective "clipp". Did you mean "clip"?'),
        ("subsets:", "baseline: nobe\nsubsets:", 'my.yaml, line 3: unknown baseline "nobe". Did you mean "none"?'),
        (
            'subsets:',
            'measures: {langage: {}}\nsubsets:',
            'my.yaml, line 3: unknown measure "langage". Did you mean "language"?',
        ),
        (
            'subsets:',
            'inject: {mismatch: 0.5}\nsubsets:',
            'line 3: unknown key "mismatch". Did you mean "mismatched"?',
        ),
        ("pool: ", "pool: [", "is not valid YAML"),
    ],
)  # fmt: skip
def test_mistakes_are_reported_with_line_and_remedy(text, old, new, words):
    assert old in text
    with pytest.raises(UsageError) as caught:
        read(text.replace(old, new, 1))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_mistaken_override_names_itself(text):
    with pytest.raises(
        UsageError, match=r'--set pretrain\.batchsize: unknown key "batchsize"\. Did you mean "batch_size"'
    ):
        read(text, "pretrain.batchsize=3")
    with pytest.raises(UsageError, match="not of the form"):
        read(text, "pretrain")


def test_what_filters_need_must_be_there(text):
    with pytest.raises(UsageError, match=r'line 4: the measure "clip" needs an encoder, and there is no scorer'):
        read("".join(line for line in text.splitlines(keepends=True) if not line.startswith("scorer")))
    with pytest.raises(UsageError, match=r"needs a `demo:` block"):
        read(text, "pool=demo:pool")


def test_trusted_shards_are_of_the_pool(text):
    train = f"{{model: {MODEL}, samples_seen: 8, batch_size: 4, warmup_steps: 1}}"
    good = read(text, f"scorer={{trusted: {{shards: ['00001']}}, train: {train}}}")
    assert good.scorer.trusted.shards == ("00001",)
    with pytest.raises(UsageError, match=r'unknown shard "00002"'):
        read(text, f"scorer={{trusted: {{shards: ['00002']}}, train: {train}}}")
    with pytest.raises(UsageError, match="none is left"):
        read(text, f"scorer={{trusted: {{shards: ['00000', '00001']}}, train: {train}}}")
    with pytest.raises(UsageError, match="either shards"):
        read(text, f"scorer={{trusted: {{}}, train: {train}}}")


def test_packaged_recipes_are_valid(real_data):
    assert load_recipe("quickstart").demo is not None
    real = load_recipe("real", [f"pool={real_data}/pool", f"evaluate.data={real_data}/eval"])
    assert real.inject is not None and real.scorer.trusted.shards
    for name in ("clip", "simclr", "moco", "diffusion"):
        overrides = [f"evaluate.data={real_data}/eval"] + ([f"pool={real_data}/pool"] if name == "clip" else [])
        assert load_recipe(name, overrides).pretrain.objective_name == name


def test_a_task_file_is_found_next_to_the_recipe_or_in_the_data_folder(text, tmp_path):
    folder = tmp_path / "recipes"
    folder.mkdir()
    text = text.replace("/eval}", "/eval, tasks: [both.yaml, data.yaml, imagenet1k]}")
    (folder / "r.yaml").write_text(text)
    for name in ("recipes/both.yaml", "eval/both.yaml", "eval/data.yaml"):
        (tmp_path / name).write_text("")
    recipe = load_recipe(str(folder / "r.yaml"))
    assert recipe.evaluate.tasks == (str(folder / "both.yaml"), "data.yaml", "imagenet1k")
    assert recipe.text["evaluate"]["tasks"] == ["both.yaml", "data.yaml", "imagenet1k"]
    (folder / "r.yaml").write_text(text.replace("data.yaml", "none.yaml"))
    with pytest.raises(UsageError, match=r"r\.yaml, line 16: no such task file: none\.yaml\. It may be next to"):
        load_recipe(str(folder / "r.yaml"))


def test_no_such_recipe():
    with pytest.raises(UsageError, match=r"nothing\.yaml: no such file"):
        load_recipe("nothing.yaml")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("objective: simclr\nmodel: {timm: resnet18}\nsamples_sen: 8\n", r'line 3: .*"samples_sen".*"samples_seen"'),
        (
            "model: ViT-B-32\nsamples_seen: 640\nbatch_size: 64\nwarmup_steps: 5\nparallel: {num_processes: 3}\n",
            "c.yaml.*: batch_size 64 cannot",
        ),
        (
            "model: ViT-B-32\nsamples_seen: 640\nbatch_size: 64\nwarmup_steps: -1\n",
            "line 4: warmup_steps must be at least 0, not -1",
        ),
        ("model: ViT-B-32\nsamples_seen: 640\nwarmup: 5\n", "line 3: `warmup` is now `warmup_steps`"),
        ("- a list\n", "not a mapping"),
    ],
)
def test_a_config_of_one_training_is_read_like_a_recipe(text, words, tmp_path):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(UsageError, match=words):
        load_training(str(tmp_path / "c.yaml"), [])


def test_a_training_may_be_given_on_the_command_line_alone():
    settings = ["model.timm=resnet18", "objective=simclr", "samples_seen=640", "batch_size=64", "warmup_steps=1"]
    assert load_training(None, settings).steps == 10
    with pytest.raises(UsageError, match=r"--set warmup_steps: warmup_steps must be a whole number, not 'x'"):
        load_training(None, [*settings, "warmup_steps=x"])


@pytest.mark.parametrize(
    "name",
    [
        "notes",
        "units",
        "Units",
        "manifest.json",
        "locations.json",
        "checksums.json",
        "fits",
        ".lock",
        ".x",
        "..",
        "a/b",
        "x" * 130,
    ],
)
def test_names_that_a_stage_could_not_finish_under_are_refused_at_once(text, name):
    with pytest.raises(UsageError, match=r"my\.yaml, line 4: subset "):
        read(text.replace("  none:", f'  "{name}":'))


def test_names_next_to_them_are_taken(text):
    for name in ("notes-2", "unit", "manifest", "clip.json", "-", "été", "0"):
        assert name in read(text.replace("  none:", f'  "{name}":')).subsets


@pytest.mark.parametrize("word", ["no", "on", "1", "null"])
def test_names_that_yaml_does_not_read_as_text(text, word):
    with pytest.raises(UsageError, match=rf'line 4: YAML reads the key `{word}` as .*Write "{word}", with quotes'):
        read(text.replace("  none:", f"  {word}:"))
    assert word in read(text.replace("  none:", f'  "{word}":')).subsets


def test_a_recipe_that_is_no_text(tmp_path):
    (tmp_path / "a.yaml").write_bytes(b"pool: \xff")
    with pytest.raises(UsageError, match=r"a\.yaml: is not UTF-8 \(byte 6\)"):
        load_recipe(str(tmp_path / "a.yaml"))
    (tmp_path / "a.yaml").write_bytes(b"#" * (17 << 20))
    with pytest.raises(UsageError, match=r"a\.yaml: is larger than 16 MiB"):
        load_recipe(str(tmp_path / "a.yaml"))
