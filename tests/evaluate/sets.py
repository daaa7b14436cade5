"""Tiny evaluation sets in DataComp's layout, and a tiny CLIP to run on them."""

from __future__ import annotations

import json
from pathlib import Path

from tests.drawing import COLORS, picture, write_tar

CONFIG = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}
TEMPLATES = ("a photo of a {c} square.", "{c}", "some {c} things")


def write_config(folder: Path) -> str:
    """The spec of a tiny CLIP with random weights."""
    path = folder / "tiny-clip.json"
    path.write_text(json.dumps(CONFIG))
    return f"{path}:random"


def classification_samples(n: int, classes: int = 6) -> list[dict]:
    """Pictures of one colour, the label being the colour; in the formats that sets use."""
    names = list(COLORS)
    found = []
    for i in range(n):
        label, ext = (i * 5) % classes, ("jpg", "png", "webp")[i % 3]
        data = picture(COLORS[names[label % len(names)]], 100 + i, ext=ext)
        found.append({"key": f"s{i:07d}", "members": {ext: data, "cls": str(label).encode()}})
    return found


def write_classification(
    data: Path, folder: str = "wds_colors_test", n: int = 30, shards: int = 2, names: list[str] | None = None
) -> Path:
    """A classification set of `n` pictures over two shards."""
    names = list(COLORS) if names is None else names
    root = data / folder
    samples = classification_samples(n, len(names))
    for shard in range(shards):
        write_tar(root / "test" / f"{shard}.tar", samples[shard::shards])
    (root / "test" / "nshards.txt").write_text(f"{shards}\n")
    (root / "classnames.txt").write_text("\n".join(names) + "\n")
    (root / "zeroshot_classification_templates.txt").write_text("\n".join(TEMPLATES) + "\n")
    return root


def write_retrieval(data: Path, folder: str = "wds_retrieval-colors_test", n: int = 9) -> Path:
    """A retrieval set: picture i has 1 + i % 3 captions."""
    names = list(COLORS)
    samples = []
    for i in range(n):
        name = names[i % len(names)]
        captions = [f"a {name} square number {i} said {j}" for j in range(1 + i % 3)]
        members = {"jpg": picture(COLORS[name], 300 + i), "txt": "\n".join(captions).encode()}
        samples.append({"key": f"s{i:07d}", "members": members})
    root = data / folder
    write_tar(root / "test" / "0.tar", samples)
    (root / "test" / "nshards.txt").write_text("1")
    (root / "dataset_type.txt").write_text("retrieval\n")
    return root
