"""Tensors on disk, one at a time: what a file holds is known before it is read, and files are written as a stream.

Whoever fills a network has one tensor in flight, and so has whoever writes one. Files are safetensors. A pickle is
read only where the caller allows it, and then as tensors: code in it is never run.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import uuid
import zipfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

Name = str | os.PathLike[str]

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}  # the names that safetensors gives to what public files hold
COMPUTED = (torch.float64, torch.float32, torch.float16, torch.bfloat16)  # the types that networks run in
SAFETENSORS, PICKLES = ".safetensors", (".ckpt", ".pt", ".pth", ".bin")  # how names of weight files end
VARIANTS = ("", ".fp16")  # of a folder's weights, by preference
IGNORED = ("model_ema.", "position_ids", "denoiser.sigmas")  # averages and constants of some published files


class Writable(Protocol):
    """What takes bytes, one after another."""

    def write(self, data: Any, /) -> Any:
        """Take bytes, or anything that has them in place."""
        ...


@dataclass(frozen=True)
class Stored:
    """A tensor that is read when it is asked for."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]

    def reshape(self, *shape: int) -> Stored:
        """The same values in another shape."""
        return replace(self, shape=shape, read=lambda: self.read().reshape(shape))

    @property
    def T(self) -> Stored:
        """The transposed matrix, which has memory of its own."""

        def read() -> Tensor:
            return self.read().T.contiguous()

        return replace(self, shape=self.shape[::-1], read=read)

    def chunk(self, count: int) -> tuple[Stored, ...]:
        """Equal parts along the first dimension, each with memory of its own."""
        shape = (self.shape[0] // count, *self.shape[1:])

        def part(index: int) -> Stored:
            def read() -> Tensor:
                return self.read().chunk(count)[index].clone()

            return replace(self, shape=shape, read=read)

        return tuple(part(index) for index in range(count))

    def to(self, dtype: torch.dtype) -> Stored:
        """The values in another type."""
        return replace(self, dtype=dtype, read=lambda: self.read().to(dtype))


State = Mapping[str, Stored]


def stored(state: Mapping[str, Tensor | Stored]) -> dict[str, Stored]:
    """A state of which tensors may be there already."""
    return {
        key: value if isinstance(value, Stored) else Stored(tuple(value.shape), value.dtype, value.detach)
        for key, value in state.items()
    }


def joined(parts: Sequence[Stored]) -> Stored:
    """Tensors one after the other, along the first dimension."""
    shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
    return Stored(shape, parts[0].dtype, lambda: torch.cat([part.read() for part in parts]))


def read_file(path: Name, allow_pickle: bool = False) -> dict[str, Stored]:
    """What a file of weights holds.

    Raises FileNotFoundError, and ValueError for a pickle, unless `allow_pickle`, and for a damaged file.
    """
    if not os.path.exists(path):
        raise FileNotFoundError(f"no weights at {path}: there is no such file or folder")
    if os.fspath(path).endswith(SAFETENSORS):
        return _read_safetensors(path)
    if not allow_pickle:
        raise ValueError(
            f"{path} is no {SAFETENSORS} file. Set allow_pickle = true beside its name to take the tensors of a "
            "pickle; code in it is not run"
        )
    return _read_pickle(path)


def read_folder(folder: Name, allow_pickle: bool = False) -> dict[str, Stored]:
    """What a model folder of diffusers or transformers holds, in one file or in shards."""
    names = weight_files(folder, os.listdir(folder), lambda name: read_json(Path(folder, name)), allow_pickle)
    state: dict[str, Stored] = {}
    for name in names:
        part = read_file(Path(folder, name), allow_pickle)
        if twice := sorted(state.keys() & part.keys()):
            raise ValueError(f"{folder}: several of {names} hold {twice}")
        state |= part
    return state


def weight_files(
    folder: Name, names: Collection[str], read_json: Callable[[str], Any], allow_pickle: bool = False
) -> list[str]:
    """Which of a model folder's files hold its weights: whole before fp16, and pickles only if there is nothing else.

    Raises FileNotFoundError where none does, and ValueError where only a pickle does, which `allow_pickle` permits, and
    for an index that names no file.
    """
    forms = [(stem, "safetensors") for stem in ("diffusion_pytorch_model", "model")]
    pickled = [(stem, "bin") for stem in ("diffusion_pytorch_model", "pytorch_model")]
    for kinds in (forms, pickled):
        for variant in VARIANTS:
            for stem, suffix in kinds:
                whole, index = f"{stem}{variant}.{suffix}", f"{stem}.{suffix}.index{variant}.json"
                found = [whole] if whole in names else []
                if not found and index in names:
                    found = sorted(set(read_json(index).get("weight_map", {}).values()))
                    if not found:
                        raise ValueError(f"{folder}: {index} names no file in its weight_map")
                    if missing := [name for name in found if name not in names]:
                        raise FileNotFoundError(f"{folder}: {index} names {missing}, which are not there")
                if found and kinds is pickled and not allow_pickle:
                    raise ValueError(
                        f"{folder} holds pickles only, {found}. Set allow_pickle = true beside its name to take their "
                        "tensors; code in them is not run"
                    )
                if found:
                    return found
    expected = [f"{stem}{variant}.safetensors" for stem, _ in forms for variant in VARIANTS]
    raise FileNotFoundError(f"{folder} holds none of {expected}, whole or in shards; it holds {sorted(names)}")


def read_metadata(path: Name) -> dict[str, str]:
    """The metadata of a safetensors file; of another file, none."""
    if not os.fspath(path).endswith(SAFETENSORS):
        return {}
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path} is no whole safetensors file: {error}") from error


def write_file(
    path: Name,
    state: State,
    metadata: Mapping[str, str] | None = None,
    wrote: Callable[[str], None] = lambda key: None,
) -> None:
    """Write a safetensors file tensor by tensor, under another name until it is whole; `wrote` is told every key."""
    target = Path(path)
    partial = target.with_name(f".{target.name}.{uuid.uuid4().hex}.partial")
    try:
        with open(partial, "wb") as file:
            write_stream(file, state, metadata, wrote)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def write_stream(
    file: Writable,
    state: State,
    metadata: Mapping[str, str] | None = None,
    wrote: Callable[[str], None] = lambda key: None,
) -> int:
    """Write what a safetensors file holds, tensor by tensor, in order; gives its size in bytes."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    order = sorted(state, key=lambda key: (-state[key].dtype.itemsize, key))  # so that every tensor is aligned
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for key in order:
        begin, end = end, end + math.prod(state[key].shape) * state[key].dtype.itemsize
        header[key] = {
            "dtype": names[state[key].dtype],
            "shape": list(state[key].shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for key in order:
        tensor = state[key].read()
        assert (tuple(tensor.shape), tensor.dtype) == (state[key].shape, state[key].dtype), key
        file.write(raw(tensor.cpu().contiguous()))
        wrote(key)
    return 8 + len(text) + end


def fill(
    module: nn.Module, state: State, what: str, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> None:
    """Give a module that was built on the meta device its parameters, one at a time.

    They come in `dtype`, or their own where None. The peak is one model and one tensor. Raises ValueError that lists
    every key of `what` that does not fit, and for types that no network runs in, or several where `dtype` is None.
    """
    names = [name for name, _ in module.named_parameters()]
    check_keys(what, shapes(state), shapes(dict(module.named_parameters())))
    if whole := {key: str(state[key].dtype) for key in names if not state[key].dtype.is_floating_point}:
        raise ValueError(f"{what} holds weights that are no floating-point numbers: {whole}")
    types = {state[key].dtype for key in names}
    if dtype is None and (len(types) > 1 or not types.issubset(COMPUTED)):
        raise ValueError(f"{what} holds weights of {sorted(map(str, types))}: name one type to load them in")
    for key in names:
        owner, _, attribute = key.rpartition(".")
        value = nn.Parameter(state[key].read().to(device, dtype))
        setattr(module.get_submodule(owner), attribute, value)


def below(state: State, prefix: str) -> dict[str, Stored]:
    """What lies behind a prefix, without it and without what no network reads."""
    return {
        key.removeprefix(prefix): value
        for key, value in state.items()
        if key.startswith(prefix) and not is_ignored(key)
    }


def is_ignored(key: str) -> bool:
    """Whether no network reads what a published file has under this key."""
    return any(word in key for word in IGNORED)


def check_keys(what: str, found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raise ValueError that counts and lists every key that is missing, unexpected or of another shape."""
    missing = sorted(expected.keys() - found.keys())
    unexpected = sorted(found.keys() - expected.keys())
    differ = [
        f"{key}: {found[key]} for {expected[key]}"
        for key in sorted(found.keys() & expected.keys())
        if found[key] != expected[key]
    ]
    if missing or unexpected or differ:
        reason = ""
        if is_lora(found):
            reason = " It is a LoRA, which changes a model and is none: merge it into its model first."
        elif not found.keys() & expected.keys():
            reason = " It holds nothing of this network."
        raise ValueError(
            f"{what} does not fit: {len(missing)} keys are missing, {len(unexpected)} unexpected, {len(differ)} of "
            f"another shape.{reason}\nmissing: {missing}\nunexpected: {unexpected}\nshapes: {differ}"
        )


def is_lora(keys: Iterable[str]) -> bool:
    """Whether keys are those of a LoRA (arXiv 2106.09685), as trainers of SDXL name them."""
    return any("lora_" in key.lower() for key in keys)


def shapes(state: Mapping[str, Tensor] | State) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor, for `check_keys`."""
    return {key: tuple(value.shape) for key, value in state.items()}


def read_json(path: Name) -> Any:
    """What a JSON file holds. Raises ValueError that names the file where it is none."""
    try:
        return json.loads(Path(path).read_text())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error


def raw(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU, in place."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data


def _read_safetensors(path: Name) -> dict[str, Stored]:
    """Read with plain reads: pages of a mapped file would count as memory of the process beside the copy of them."""
    read_metadata(path)  # the library checks that the header is sound and the file whole
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)

    def entry(key: str, dtype: str, shape: Sequence[int], data_offsets: Sequence[int]) -> Stored:
        if dtype not in DTYPES:
            raise ValueError(f"{path}: {key} is of type {dtype}, and weights are {', '.join(DTYPES)}")

        def read() -> Tensor:
            tensor = torch.empty(tuple(shape), dtype=DTYPES[dtype])
            with open(path, "rb", buffering=0) as data:
                data.seek(8 + length + data_offsets[0])
                view, done = raw(tensor), 0
                while done < len(view):
                    count = data.readinto(view[done:])
                    if not count:
                        raise ValueError(f"{path} ends within {key}")
                    done += count
            return tensor

        return Stored(tuple(shape), DTYPES[dtype], read)

    return {key: entry(key, **values) for key, values in header.items()}


def _read_pickle(path: Name) -> dict[str, Stored]:
    mapped = zipfile.is_zipfile(path)  # PyTorch's older form cannot be mapped
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:  # whose text says how to run the code
        raise ValueError(
            f"{path} is refused: it holds more than tensors, such as code, or is damaged. Convert it to safetensors "
            "where you trust it"
        ) from error
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds a {type(content).__name__}, not tensors by name")
    return dict(_copies(content))


def _copies(content: Mapping[str, Any]) -> Iterator[tuple[str, Stored]]:
    for key, value in content.items():
        if isinstance(value, Tensor):
            yield key, Stored(tuple(value.shape), value.dtype, value.detach().clone)
