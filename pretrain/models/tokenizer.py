"""Tokenizers of open_clip's models, and caches of their results."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer

from winnow.infra.io.storage import digest_json

# Captions repeat (every epoch, and on the web); BPE of one takes about as long as decoding a thumbnail.
_CAPTIONS = 1 << 17


def build_tokenizer(
    config: dict[str, Any], name: str | None = None, folder: Path | None = None
) -> Callable[[Sequence[str]], torch.Tensor]:
    """The tokenizer of a model: texts to int64 [n, context]; by open_clip's name where it has one.

    Equal ones are the same object: to build one takes as long as to load a small model.

    Args:
        config: open_clip's model config.
        name: open_clip's name of the model.
        folder: a checkpoint whose files transformers reads where the config names a tokenizer of it.
    """
    text = config["text_cfg"]
    if folder is not None and text.get("hf_tokenizer_name"):
        given = {"context_length": 77, **(text.get("tokenizer_kwargs") or {})}
        given |= {"context_length": text["context_length"]} if "context_length" in text else {}
        # No network, and no code out of the folder.
        offline = {"local_files_only": True, "trust_remote_code": False}
        return HFTokenizer(str(folder), tokenizer_mode=text.get("tokenizer_mode"), **given, **offline)
    text = {"context_length": 77, "tokenizer_kwargs": {}} | config["text_cfg"]
    read = ("hf_tokenizer_name", "tokenizer_mode", "context_length", "tokenizer_kwargs")
    return _tokenizer(name, json.dumps([text.get(key) for key in read], sort_keys=True))


@functools.lru_cache(maxsize=8)
def _tokenizer(name: str | None, settings: str) -> Any:
    if name is not None:
        return open_clip.get_tokenizer(name)
    hf_name, mode, context, kwargs = json.loads(settings)
    given = {"context_length": context, **(kwargs or {})}
    return HFTokenizer(hf_name, tokenizer_mode=mode, **given) if hf_name else SimpleTokenizer(**given)


def caching_tokens(tokenizer: Callable[[Sequence[str]], torch.Tensor]) -> Callable[[str], np.ndarray]:
    """One caption to int32 [context], with the latest results cached."""

    @functools.lru_cache(maxsize=_CAPTIONS)
    def tokens(text: str) -> np.ndarray:
        result = tokenizer([text])[0].numpy().astype(np.int32)
        result.flags.writeable = False
        return result

    return tokens


_token_caches: dict[str, Any] = {}


def token_cache(tokenizer: Any) -> Any:
    """Tuples of texts to int64 [n, context], with the latest results cached. Equal tokenizers share the cache."""

    def tokens(texts: tuple[str, ...]) -> torch.Tensor:
        result: torch.Tensor = tokenizer(list(texts))
        return result

    if type(tokenizer) is not SimpleTokenizer or tokenizer.reduction_fn is not None:
        return tokens
    key = f"{_vocabulary(tokenizer)} {tokenizer.context_length} {tokenizer.clean_fn.__name__}"
    return _token_caches.setdefault(key, functools.lru_cache(maxsize=64)(tokens))


@functools.lru_cache(maxsize=8)
def _vocabulary(tokenizer: Any) -> str:
    return digest_json(sorted(tokenizer.encoder.items()))
