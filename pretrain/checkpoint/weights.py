"""Files of weights as trainers leave them: read without executing anything, unwrapped, and loaded where they fit.

Nothing is interpolated: weights for another image size or context length are refused.
"""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from open_clip.convert import convert_state_dict, load_big_vision_weights
from open_clip.model import convert_to_custom_text_state_dict
from safetensors.torch import load_file

from winnow.infra.errors import WinnowError
from winnow.infra.io.content import LFS_POINTER, is_lfs_pointer

# Where trainers keep the state dict in what they save; of several, the first is taken.
_KEYS = ("state_dict", "model_state_dict", "state_dict_ema", "model_ema", "model", "module")
_PREFIXES = ("module.", "model.")  # of DataParallel and Lightning, where all names have them
_WRAPPERS = re.compile(r"(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")  # torch's, anywhere in a name
# Numbers that OpenAI's archives hold as weights, and what transformers no longer has.
_IGNORED = {"input_resolution", "context_length", "vocab_size", "text.transformer.embeddings.position_ids"}
_POSITIONS = ("positional_embedding", "pos_embed")
_HEADER_BYTES = 32 << 20  # of a safetensors file; that of a network with 100,000 tensors has 10 MB
_NAMED = 3  # names in a message
State = dict[str, torch.Tensor]


def load_weights(model: Any, state: State | Path, where: str) -> None:
    """Load what `read_weights` gives into an open_clip model. `where` names it in messages.

    Raises:
        WinnowError: it does not fit.
    """
    if isinstance(state, Path):
        with torch.no_grad():
            load_big_vision_weights(model, str(state))
        return
    own: State = model.state_dict()
    found: State = convert_state_dict(model, state)
    if "positional_embedding" in found and "positional_embedding" not in own:
        found = convert_to_custom_text_state_dict(found)
    for name in _IGNORED - own.keys():
        found.pop(name, None)
    if "logit_bias" in own and "logit_bias" not in found:  # for SigLIP that starts from CLIP, as open_clip loads it
        found["logit_bias"] = torch.zeros_like(own["logit_bias"])
    for name in {"logit_scale", "logit_bias"} & found.keys() & own.keys():
        found[name] = found[name].reshape(own[name].shape)
    _check_fit(found, own, where)
    model.load_state_dict(found)


def read_weights(path: Path, where: str) -> State | Path:
    """The tensors of a file by name, without what training wraps around it and them.

    Args:
        path: a state dict by `torch.save`, bare or as trainers wrap it; safetensors; or big_vision's `.npz`, which is
            left to open_clip.
        where: names the weights in messages.

    Raises:
        WinnowError: it is no state dict.
    """
    with path.open("rb") as file:
        head = file.read(64)
    if is_lfs_pointer(head):
        raise _refused(f"is {LFS_POINTER}", where)
    if path.suffix == ".safetensors":
        return _unwrapped(read_safetensors(path, where), where)
    _check_archive(path, where)
    if path.suffix in (".npz", ".npy"):
        return path
    try:
        return _unwrapped(torch.load(path, map_location="cpu", weights_only=True), where)
    except pickle.UnpicklingError:
        what = "is damaged, or holds more than tensors, and none of that is executed"
        raise _refused(what, where, "The weights must be a state dict that fits the model.") from None


def read_safetensors(path: Path, where: str) -> State:
    """The tensors of a safetensors file by name. Raises WinnowError."""
    with path.open("rb") as file:
        head = file.read(64)
    if is_lfs_pointer(head):
        raise _refused(f"is {LFS_POINTER}", where)
    if int.from_bytes(head[:8], "little") > min(_HEADER_BYTES, path.stat().st_size):
        raise _refused("is not a safetensors file, or is cut off", where)
    state: State = load_file(path)
    return state


def _check_archive(path: Path, where: str) -> None:
    """Refuse a TorchScript archive, and one that unpacks to much more than it has."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
    if any("/code/" in f"/{member.filename}" for member in members):
        do = "Load it once where you trust it, and save `torch.jit.load(FILE).state_dict()` by torch.save."
        raise _refused("is a TorchScript archive, which is code, and none of that is executed", where, do)
    if sum(member.file_size for member in members) > 4 * path.stat().st_size:
        raise _refused("unpacks to more than four times its size, which weights do not", where)


def _unwrapped(loaded: Any, where: str) -> State:
    for _ in _KEYS:
        if not isinstance(loaded, Mapping) or any(torch.is_tensor(value) for value in loaded.values()):
            break
        found = next((key for key in _KEYS if isinstance(loaded.get(key), Mapping)), None)
        if found is None:
            break
        loaded = loaded[found]
    if not isinstance(loaded, Mapping) or not any(torch.is_tensor(value) for value in loaded.values()):
        what = _listed(list(loaded)) or "nothing" if isinstance(loaded, Mapping) else f"a {type(loaded).__name__}"
        raise _refused(f"is no state dict (tensors by name), it holds {what}", where)
    state = {_WRAPPERS.sub("", str(name)): value for name, value in loaded.items()}
    while prefix := next((one for one in _PREFIXES if all(name.startswith(one) for name in state)), None):
        state = {name.removeprefix(prefix): value for name, value in state.items()}
    if others := [name for name, value in state.items() if not torch.is_tensor(value)]:
        raise _refused(f"holds values that are not tensors: {_listed(others)}", where)
    return state


def _check_fit(state: State, own: State, where: str) -> None:
    """Refuse weights whose names or shapes are not those of the model, in a sentence about what they are."""
    if "logit_bias" in state and "logit_bias" not in own:
        do = 'Take the name of a SigLIP model, or a config with "init_logit_bias": -10.'
        raise _refused("has a logit_bias: weights of SigLIP, and the model is a CLIP without it", where, do)
    missing = [name for name in own if name not in state]
    more = [name for name in state if name not in own]
    if len(missing) == len(own):
        raise _refused(f"has none of the model's names; it has {_listed(more)}", where)
    if missing or more:
        parts = [f"lacks {_listed(missing)}"] if missing else []
        parts += [f"has {_listed(more)} that the model has not"] if more else []
        raise _refused(" and ".join(parts), where)
    wrong = [name for name in own if state[name].shape != own[name].shape]
    if not wrong:
        return
    shapes = f"{wrong[0]} is {list(state[wrong[0]].shape)}, and the model's {list(own[wrong[0]].shape)}"
    if not all(name.endswith(_POSITIONS) for name in wrong):
        raise _refused(f"has {len(wrong)} weights of other shapes: {shapes}", where)
    what = "image size" if "visual" in wrong[0] else "context length"
    do = "Nothing is interpolated: give the config it was trained with, as CONFIG.json:FILE."
    raise _refused(f"was trained at another {what}: {shapes}", where, do)


def _listed(names: list[Any]) -> str:
    more = len(names) - _NAMED
    return ", ".join(str(name) for name in names[:_NAMED]) + (f" and {more} more" if more > 0 else "")


def _refused(what: str, where: str, do: str | None = None) -> WinnowError:
    return WinnowError(f"cannot be loaded: the file {what}", where=where, do=do)
