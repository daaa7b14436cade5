"""A hand-made dictionary in the format of WordNet's files (wndb(5), morphy(7))."""

HEADER = "".join(
    f"  {i} {line}  \n" for i, line in enumerate(["This is made up.", "WordNet 3.0 Copyright 2006 by no one."], 1)
)
# lemma: offsets of its synsets, first sense first
NOUNS = {
    "dog": [100, 900],
    "church": [110],
    "wolf": [120],
    "calf": [121],
    "fox": [130],
    "baby": [140],
    "fireman": [150],
    "lens": [160],
    "len": [161],
    "run": [170],
    "ax": [180],
    "axis": [181],
    "rose": [190],
    "ice_cream": [195],
    "glasses": [196],
    "glass": [197],
}
VERBS = {"run": [300], "bake": [310], "bak": [311], "eat": [320], "rose": [330], "love": [340], "dog": [350]}
ADJECTIVES = {"fine": [400], "big": [410], "quick": [100]}
ADVERBS = {"well": [500], "quickly": [510]}
EXCEPTIONS = {
    "noun": ["wolves wolf", "axes ax axis", "lenses lens", "roses rosum", "glasses glas"],
    "verb": ["ran run", "ate eat"],
    "adj": ["bigger big", "better good"],
    "adv": ["best well", "better well"],
}


def write_dictionary(folder, version="3.0"):
    """The eight files; the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    tables = {"noun": ("n", NOUNS), "verb": ("v", VERBS), "adj": ("a", ADJECTIVES), "adv": ("r", ADVERBS)}
    for name, (pos, lemmas) in tables.items():
        lines = []
        for i, (lemma, offsets) in enumerate(sorted(lemmas.items())):
            pointers = ["@", "~", "%p"][: i % 4]
            fields = [lemma, pos, len(offsets), len(pointers), *pointers, len(offsets), min(i, len(offsets))]
            lines.append(" ".join([*map(str, fields), *(f"{offset:08d}" for offset in offsets)]) + "  \n")
        header = HEADER.replace("3.0", version)
        (folder / f"index.{name}").write_text(header + "".join(lines))
        (folder / f"{name}.exc").write_text("".join(f"{line}\n" for line in EXCEPTIONS[name]))
    return folder
