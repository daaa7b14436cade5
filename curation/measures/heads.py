"""Scores from CLIP embeddings: small trained heads, and pairs of prompts."""

from __future__ import annotations

import functools
import io
import re
from collections.abc import Sequence
from zipfile import ZipFile

import numpy as np

from winnow.infra.errors import WinnowError
from winnow.infra.io import storage
from winnow.infra.io.content import LFS_POINTER, is_lfs_pointer

# A head has a few hundred kilobytes. A larger file is something else.
_LARGEST = 1 << 28
Layer = tuple[np.ndarray, np.ndarray]


@functools.lru_cache(maxsize=4)
def read_head(path: str) -> tuple[Layer, ...]:
    """The linear layers of a head, in order: weights [out, in] and biases [out], float32.

    The file is a .safetensors or .npz with arrays `weight` and `bias` (or one pair per layer, `layers.0.weight`,
    `layers.2.weight`, …, in numerical order), or a .npy with the weights of one output. A bias may be missing.

    Raises:
        WinnowError: the file does not exist, has another format, or its layers do not fit together.
    """
    if storage.exists(path) and storage.size_of(path) > _LARGEST:
        raise WinnowError("is too large for a head on an embedding", where=path)
    data = storage.read_bytes(path)
    if is_lfs_pointer(data[:60]):
        raise WinnowError(f"is {LFS_POINTER}", where=path)
    try:
        if path.endswith(".safetensors"):
            from safetensors.numpy import load

            arrays = load(data)
        elif path.endswith((".npz", ".npy")):
            if path.endswith(".npz") and sum(m.file_size for m in ZipFile(io.BytesIO(data)).infolist()) > _LARGEST:
                raise WinnowError("is too large for a head on an embedding", where=path)
            loaded = np.load(io.BytesIO(data), allow_pickle=False)
            arrays = {"weight": loaded} if isinstance(loaded, np.ndarray) else dict(loaded)
        else:
            raise WinnowError("is not a .safetensors, .npz or .npy file", where=path, do="Convert the head to one.")
    except WinnowError:
        raise
    except Exception as error:  # safetensors and NumPy raise many kinds of errors on broken data
        raise WinnowError(f"cannot be read as a head ({error})", where=path) from error
    layers = []
    names = [name for name in arrays if re.fullmatch(r"(.*\.)?weight", name)]
    for name in sorted(names, key=lambda name: [int(number) for number in re.findall(r"\d+", name)]):
        weight = np.atleast_2d(np.asarray(arrays[name], np.float32))
        bias = arrays.get(f"{name.removesuffix('weight')}bias", np.zeros(len(weight)))
        layers.append((weight, np.atleast_1d(np.asarray(bias, np.float32)).reshape(-1)))
    _check(layers, path)
    return tuple(layers)


def _check(layers: Sequence[Layer], path: str) -> None:
    if not layers:
        raise WinnowError("holds no array `weight`", where=path)
    for (weight, bias), (following, _) in zip(layers, [*layers[1:], layers[-1]], strict=True):
        fits = weight.ndim == 2 and bias.shape == weight.shape[:1]
        if not fits or (following is not weight and following.shape[1] != len(weight)):
            raise WinnowError("its layers do not fit together", where=path)
    if len(layers[-1][0]) != 1:
        raise WinnowError(f"has {len(layers[-1][0])} outputs, a head has one", where=path)
    if not all(np.isfinite(array).all() for layer in layers for array in layer):
        raise WinnowError("has weights that are not finite", where=path)


def apply_head(path: str, vectors: np.ndarray, relu: bool = False, sigmoid: bool = False) -> np.ndarray:
    """The output of the head in a file for L2-normalised embeddings [n, d]; float32, shape [n].

    Args:
        relu: whether a ReLU follows each layer except the last.
        sigmoid: whether a sigmoid is applied to the output.

    Raises:
        WinnowError: the head takes another dimension, or cannot be read.
    """
    layers = read_head(path)
    x = vectors.astype(np.float32)
    if x.shape[1] != layers[0][0].shape[1]:
        what = f"takes embeddings of {layers[0][0].shape[1]} dimensions, these have {x.shape[1]}"
        raise WinnowError(what, where=path, do="A head needs the embeddings of the model it was trained on.")
    for number, (weight, bias) in enumerate(layers):
        x = x @ weight.T + bias
        if relu and number + 1 < len(layers):
            x = np.maximum(x, 0)
    result = x[:, 0]
    return 1 / (1 + np.exp(-result)) if sigmoid else result


def prompt_probability(vectors: np.ndarray, yes: np.ndarray, no: np.ndarray, logit_scale: float) -> np.ndarray:
    """Probability that an image matches a prompt rather than its opposite, averaged over pairs of prompts.

    Wang, Chan & Loy 2023 (CLIP-IQA), equations 1 and 2: with s the scaled cosines, exp(s_yes) / (exp(s_yes) +
    exp(s_no)); several pairs are averaged.

    Args:
        vectors: L2-normalised image embeddings, shape [n, d].
        yes, no: L2-normalised text embeddings of the prompts, shape [pairs, d].
        logit_scale: the model's.

    Returns:
        float32, shape [n].
    """
    difference = vectors.astype(np.float32) @ (yes - no).T.astype(np.float32) * logit_scale
    return (1 / (1 + np.exp(-difference))).mean(axis=1)
