"""DataComp's image-based filter, with its caption pre-filter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from winnow.curation.columns.pool_columns import dimensions, split_targets
from winnow.curation.columns.table import View, embeddings
from winnow.curation.filters.base import Filter, Names, Positive, Search, State, each
from winnow.curation.search.centroids import NearestCentroid, fitted_state, hit_report, nearest_centroid_of
from winnow.curation.search.kmeans import check_clusters, enough, sample_vectors, train_centroids
from winnow.infra.errors import WinnowError
from winnow.infra.io.arrays import is_array, load_matrix, matrix_shape, usable_rows
from winnow.infra.params import ParameterError, params

_MEASURED, _DATACOMP = "clip.image", "l14_img"
# Tokens are separated as in fastText's Dictionary::readWord. A newline is also a token.
_TOKEN = r"[^ \n\r\t\v\f\x00]+"


@params
class ImageBased(Filter):
    """English captions of some length, and an image embedding whose nearest centroid is that of a target image.

    Gadre et al. 2023 (DataComp), "Image-based filtering": captions in English by fastText, of more than 1 fastText
    token and more than 5 characters; of k centroids the one with the largest inner product with the embedding must be
    that of at least one target image. DataComp releases the centroids of its pools (k = 100,000) and takes the
    embeddings of ImageNet-1k's training images as targets, both by OpenAI's ViT-L/14. With `clip_score` under `all`
    this is its "image-based ∩ CLIP score". `image_cluster` is the same without the captions.

    Deviation: target images whose embedding is not finite or 0 are ignored, and samples with such an embedding never
    pass. The norms of targets in arrays do not matter.

    Args:
        target: embeddings as a .npy file (float16 or float32, shape [m, d]), a folder of shards with the target
            images, or a list of either.
        centroids: .npy file, shape [k, d]; None to find them by k-means on the pool's embeddings.
        clusters: k, when there is no file.
        features: the pool's column of image embeddings; None for `clip.image` where targets are folders, which the
            recipe's scorer embeds, and for DataComp's `l14_img` where targets are arrays.
        target_features: the same for target folders; None for `clip.image`.
        language: ISO 639 code; None for any.
        min_tokens, min_characters: at least this many (DataComp: more than 1, more than 5).
        seed: of k-means.
        sample: pool embeddings to train k-means on; None for 256 a cluster, fewer if those took more than 8 GiB.
        search: "exact", as DataComp; "coarse", whose recall the funnel reports; "auto", exact up to 20,000 centroids
            and on a GPU.
    """

    target: Names
    centroids: str | None = None
    clusters: Positive = 100_000
    features: str | None = None
    target_features: str | None = None
    language: str | None = "en"
    min_tokens: Annotated[int, Field(ge=0)] = 2
    min_characters: Annotated[int, Field(ge=0)] = 6
    seed: int = 0
    sample: Positive | None = None
    search: Search = "exact"

    name: ClassVar[str] = "image_based"
    paper: ClassVar[str] = "Gadre et al. 2023 (DataComp)"
    example: ClassVar[Mapping[str, Any]] = {"target": "target.npy"}
    files: ClassVar[tuple[str, ...]] = ("centroids", "target")

    def __post_init__(self) -> None:
        if self.targets() and self.arrays():
            what = f"image_based: {self.arrays()[0]} is an array and {self.targets()[0]} a folder"
            raise ParameterError(what, do="The targets are either all arrays or all folders.").below("target")
        check_clusters(self.name, self.clusters, self.sample)
        if self.centroids is not None and not is_array(self.centroids):
            what = f'image_based: centroids "{self.centroids}" is not a .npy file'
            do = "Save them with `numpy.save`, or leave them out to cluster the pool."
            raise ParameterError(what, do=do).below("centroids")

    def targets(self) -> tuple[str, ...]:
        return split_targets(self.target)[0]

    def arrays(self) -> tuple[str, ...]:
        """The targets that are array files."""
        return split_targets(self.target)[1]

    def target_columns(self) -> tuple[str, ...]:
        return (self.target_features or _MEASURED,)

    @property
    def column(self) -> str:
        """The pool's column of embeddings."""
        return self.features or (_MEASURED if self.targets() else _DATACOMP)

    def columns(self) -> tuple[str, ...]:
        return ("text", self.column, *(("language.code",) if self.language is not None else ()))

    def check(self, view: View) -> None:
        """Raises WinnowError for an empty target set, fewer samples than clusters, or embeddings of the pool, the
        centroids and the targets that differ in dimension."""
        if self.centroids is None:
            enough(self.name, self.clusters, len(view))
        shapes = {name: matrix_shape(name) for name in self.arrays()}
        known = [name for name in self.targets() if name in view.targets]
        for name in known:
            target = view.target(name)
            shapes[name] = (len(target), dimensions(target, self.target_columns()[0]) or 0)
        if len(known) == len(self.targets()) and not sum(rows for rows, _ in shapes.values()):
            raise WinnowError("the target set is empty", where=", ".join(shapes), do="Give one with images.")
        found = {f"the pool's {self.column}": dimensions(view, self.column)}
        if self.centroids is not None:
            found[f"the centroids {self.centroids}"] = matrix_shape(self.centroids)[1]
            if not matrix_shape(self.centroids)[0]:
                raise WinnowError("holds no centroid", where=self.centroids, do="Leave it out to cluster the pool.")
        found |= {f"the target {name}": width for name, (rows, width) in shapes.items() if rows}
        widths = {source: width for source, width in found.items() if width}
        if len(set(widths.values())) > 1:
            listed = ", ".join(f"{source} has {n}" for source, n in widths.items())
            do = "All must come from one model; name the pool's column of its embeddings as `features`."
            raise WinnowError(f"embeddings differ in dimension: {listed}", where="image_based", do=do)

    def fit(self, view: View) -> State:
        self.check(view)
        if self.centroids is not None:
            centroids = np.array(load_matrix(self.centroids), dtype=np.float32)
            if broken := int(np.count_nonzero(~np.isfinite(centroids).all(axis=1))):
                raise WinnowError(f"{broken:,} of {len(centroids):,} centroids are not finite", where=self.centroids)
        else:
            pool = sample_vectors(view, self.column, self.clusters, self.sample, self.seed)
            centroids = train_centroids(pool, self.clusters, seed=self.seed, sample=len(pool), search=self.search)
        nearest_centroid = NearestCentroid(centroids, self.search)
        hit, ignored = np.zeros(len(centroids), dtype=bool), 0
        for number, (vectors, usable) in enumerate(self._target_embeddings(view)):
            vectors, ignored = vectors[usable], ignored + int(np.count_nonzero(~usable))
            if number == 0:
                nearest_centroid.tune(vectors)
            if len(vectors):
                hit[nearest_centroid(vectors)] = True
        if not hit.any():
            where = ", ".join(each(self.target))
            raise WinnowError("the target set has no usable image", where=where, do="Give one that has.")
        return fitted_state(nearest_centroid, hit, ignored)

    def _target_embeddings(self, view: View, block: int = 1 << 16) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Blocks of target embeddings, and which of them have a value."""
        for name in self.arrays():
            matrix = load_matrix(name)
            for start in range(0, len(matrix), block):
                part = np.array(matrix[start : start + block], dtype=np.float32)
                yield part, usable_rows(part)
        (column,) = self.target_columns()
        for name in self.targets():
            for batch in view.target(name).batches((column,)):
                yield embeddings(batch, column)

    def mask(self, batch: pa.Table, state: State) -> np.ndarray:
        mask = self._caption(batch)
        vectors, usable = embeddings(batch, self.column)
        rows = np.flatnonzero(mask & usable)
        mask[:] = False
        if len(rows):
            mask[rows] = state["hit"][nearest_centroid_of(state)(vectors[rows])]
        return mask

    def report(self, state: State) -> dict[str, Any]:
        return hit_report(state)

    def _caption(self, batch: pa.Table) -> np.ndarray:
        text = batch["text"] if batch["text"].null_count < len(batch) else pa.nulls(len(batch), pa.string())
        mask = pc.and_(
            pc.greater_equal(tokens(text), self.min_tokens), pc.greater_equal(pc.utf8_length(text), self.min_characters)
        )
        if self.language is not None:
            mask = pc.and_(mask, pc.equal(batch["language.code"], self.language))
        return np.array(pc.fill_null(mask, False))


def tokens(text: pa.ChunkedArray) -> pa.ChunkedArray:
    """The number of tokens that `fasttext.tokenize` finds in each text: runs between separators, and newlines."""
    runs = pc.count_substring_regex(text, pattern=_TOKEN)
    return pc.add(runs, pc.count_substring(text, pattern="\n"))
