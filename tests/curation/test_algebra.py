"""The algebra: YAML and Python forms are one tree; masks, counts and reasons against plain logic."""

import itertools
import pickle
from typing import ClassVar

import numpy as np
import pyarrow as pa
import pytest

from winnow.curation.algebra.funnel import TreeEvaluator
from winnow.curation.algebra.nodes import All, AnyOf, Not
from winnow.curation.algebra.parse import fingerprint, parse, unparse
from winnow.curation.filters import FILTERS
from winnow.curation.filters.base import Filter
from winnow.curation.filters.basic import Basic
from winnow.curation.filters.clip_score import ClipScore
from winnow.infra.errors import UsageError
from winnow.infra.params import params


@params
class Has(Filter):
    """Keeps samples whose column is true."""

    column: str

    name: ClassVar[str] = "has"

    def columns(self):
        return (self.column,)

    def mask(self, batch, state):
        return batch[self.column].to_numpy(zero_copy_only=False)


A, B, C = Has("a"), Has("b"), Has("c")
ALL_ROWS = list(itertools.product([False, True], repeat=3))
TABLE = pa.table({name: [row[i] for row in ALL_ROWS] for i, name in enumerate("abc")})

TREES = {
    "a": (A, lambda a, b, c: a),
    "a & b": (A & B, lambda a, b, c: a and b),
    "a & b & c": (A & B & C, lambda a, b, c: a and b and c),
    "a | b": (A | B, lambda a, b, c: a or b),
    "a & (b | c)": (A & (B | C), lambda a, b, c: a and (b or c)),
    "(a & b) | c": ((A & B) | C, lambda a, b, c: (a and b) or c),
    "~a": (~A, lambda a, b, c: not a),
    "~(a | b) & c": (~(A | B) & C, lambda a, b, c: not (a or b) and c),
    "a & ~(b & ~c)": (A & ~(B & ~C), lambda a, b, c: a and not (b and not c)),
    "nothing": (All(), lambda a, b, c: True),
}


@pytest.mark.parametrize("name", TREES)
def test_masks_against_plain_logic(name):
    node, rule = TREES[name]
    evaluator = TreeEvaluator(node, [{} for _ in node.filters()])
    assert evaluator.mask(TABLE).tolist() == [rule(*row) for row in ALL_ROWS]


def drop_set(node, table):
    return ~TreeEvaluator(node, [{} for _ in node.filters()]).mask(table)


@pytest.mark.parametrize("name", TREES)
def test_counts_against_brute_force(name):
    """`alone`: how many of the dropped would be kept if this node let everything through."""
    node, _ = TREES[name]
    table = pa.concat_tables([TABLE, TABLE.slice(2, 3)])
    evaluator = TreeEvaluator(node, [{} for _ in node.filters()])
    half = table.num_rows // 2
    evaluator.mask(table.slice(0, half))
    evaluator.mask(table.slice(half))

    def open_up(tree, target):
        """The tree with one node (by identity of its tally path) replaced by one that keeps everything."""
        if not target:
            return All()
        children = list(tree.children)
        children[target[0]] = open_up(children[target[0]], target[1:])
        if isinstance(tree, Not):
            return Not(children[0])
        return type(tree)(tuple(children))

    def check(counts, path, under_not):
        mask = TreeEvaluator(counts.node, [{} for _ in counts.node.filters()]).mask(table)
        assert (counts.kept, counts.dropped) == (mask.sum(), (~mask).sum())
        if not under_not:
            dropped, opened = drop_set(node, table), drop_set(open_up(node, path), table)
            assert counts.alone == (dropped & ~opened).sum()
        else:
            assert counts.alone == 0
        for i, child in enumerate(counts.children):
            check(child, [*path, i], under_not or isinstance(counts.node, Not))

    check(evaluator.counts, [], False)


def test_reasons_name_the_first_node_that_drops():
    evaluator = TreeEvaluator(A & (B | C), [{}, {}, {}])
    mask, why = evaluator.reasons(TABLE)
    for (a, b, c), kept, reason in zip(ALL_ROWS, mask, why.to_pylist(), strict=True):
        if not a:
            assert reason == "has(column='a')"
        elif not (b or c):
            assert reason == "has(column='b') | has(column='c')"
        else:
            assert kept and reason is None
    _, why = TreeEvaluator(~A, [{}]).reasons(TABLE)
    assert why.to_pylist() == ["~has(column='a')" if a else None for a, _, _ in ALL_ROWS]


def test_yaml_and_python_give_the_same_tree():
    tree = {
        "all": [{"clip_score": {"fraction": 0.3}}, {"any": [{"basic": {}}, {"not": {"basic": {"language": None}}}]}]
    }
    node = ClipScore(fraction=0.3) & (Basic() | ~Basic(language=None))
    assert parse(tree) == node
    assert unparse(node) == tree
    assert str(node) == "clip_score(fraction=0.3) & (basic() | ~basic(language=None))"
    assert parse({}) == parse(None) == All() and unparse(All()) == {}
    assert ~~Basic() == Basic()
    assert isinstance(Basic() | Basic(), AnyOf)


def test_a_custom_filter_by_module_and_class():
    node = parse({"tests.curation.test_algebra:Has": {"column": "a"}})
    assert type(node).__name__ == "Has"
    assert unparse(node) == {"tests.curation.test_algebra:Has": {"column": "a"}}
    assert "source" in fingerprint(node)  # its text decides too
    assert "source" not in fingerprint(Basic())


def test_fingerprints_differ_between_trees():
    trees = [Basic(), ~Basic(), Basic(min_words=4), Basic() & Basic(), Basic() | Basic(), ClipScore(fraction=0.3)]
    assert len({repr(fingerprint(tree)) for tree in trees}) == len(trees)


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ({"clip_scor": {"fraction": 0.3}}, 'unknown filter "clip_scor". Did you mean "clip_score"'),
        ({"clip_score": {"fractoin": 0.3}}, 'unknown parameter of clip_score "fractoin". Did you mean "fraction"'),
        ({"image_cluster": {}}, 'image_cluster needs "target"'),
        ({"all": {"basic": {}}}, "takes a list"),
        ({"all": []}, "takes a list"),
        ({"basic": {}, "clip_score": {"fraction": 0.1}}, "one filter at a time"),
        (["basic"], "a filter is written"),
        ({"basic": 3}, "parameters are written"),
        ({"nosuchmodule:Thing": {}}, 'no module "nosuchmodule"'),
        ({"tests.curation.test_algebra:Nothing": {}}, 'has no "Nothing"'),
        ({"pathlib:Path": {}}, "not a Filter"),
    ],
)
def test_wrong_trees_are_refused(tree, words):
    with pytest.raises(UsageError, match=words.replace("(", r"\(")):
        parse(tree)


def test_a_mask_of_the_wrong_shape_is_reported():
    class Wrong(Has):
        def mask(self, batch, state):
            return np.ones(3, dtype=bool)

    with pytest.raises(UsageError, match="shape"):
        TreeEvaluator(Wrong("a"), [{}]).mask(TABLE)


@pytest.mark.parametrize("name", FILTERS.names())
def test_every_filter_survives_yaml_and_pickle(name):
    kind = FILTERS.load(name)
    node = parse({name: dict(kind.example)})
    other = parse({"clip_score": {"keep": 5, "of": "survivors"}})
    for tree in (node, ~node, node & other, node | ~other, ~(node | other) & node, All((node,)), All(), Not(~node)):
        assert parse(unparse(tree)) == tree == pickle.loads(pickle.dumps(tree)), str(tree)
        assert hash(parse(unparse(tree))) == hash(tree)


def test_trees_print_as_python():
    assert str(A & (B | C)) == "has(column='a') & (has(column='b') | has(column='c'))"
    assert str(All((A,))) == "All((has(column='a'),))" and str(AnyOf((A | B, C))).startswith("AnyOf((")
    assert str(All()) == "All()" and str(Not(~A)) == "Not(~has(column='a'))"
