"""Where samples come from: arrays, folders of images, and datasets. Each source gives the samples at some indices as arrays.

A `Source` gives raw arrays, one `[B, ...]` for each model input, of any dtype that `check` accepts; `convert` makes of them
what the model takes. uint8 `[B, H, W, C]` are images: x = (pixel / 255 - mean) / std, as `[B, C, H, W]`. With mean 0.5 and
std 0.5, pixel 255 becomes 1 and pixel 0 becomes -1:

>>> spec = TensorSpec(name="x", shape=(None, 1, 1, 2), dtype="float32")
>>> convert(np.array([[[[255], [0]]]], np.uint8), spec, ImageOptions(mean=(0.5,), std=(0.5,)), "x.npy").tolist()
[[[[1.0, -1.0]]]]
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from qdeploy.core.errors import InputError, NotInstalledError, OptionError, one_line
from qdeploy.core.spec import TensorSpec, show_shape
from qdeploy.files.format import COPY_AGAIN

Array = NDArray[Any]
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageOptions:
    """How 8-bit images become model inputs: `size` (height, width) to resize to, and `mean` and `std` of pixels in [0, 1].

    `mean` and `std` have one number for all channels, or one for each.
    """

    size: tuple[int, int] | None = None
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)

    def __post_init__(self) -> None:
        if self.size is not None and (len(self.size) != 2 or min(self.size) < 1):
            raise OptionError("the image size is wrong", found=self.size, allowed="a height and a width of at least 1")
        for name, values in (("--mean", self.mean), ("--std", self.std)):
            if not values or not all(math.isfinite(value) for value in values):
                raise OptionError(f"{name} is wrong", found=values, allowed="finite numbers", action="give one for each channel")
        if min(self.std) <= 0:
            raise OptionError("--std is wrong", found=self.std, allowed="numbers above 0", action="use 1 to leave pixels as they are")

    def check_channels(self, channels: int) -> None:
        """Raise `OptionError` unless `mean` and `std` fit images of so many channels."""
        for name, values in (("--mean", self.mean), ("--std", self.std)):
            if len(values) not in (1, channels):
                allowed = "1 number" if channels == 1 else f"1 or {channels} numbers"
                found = f"{len(values)} numbers for images of {channels} channel{'s' * (channels > 1)}"
                raise OptionError(f"{name} has the wrong length", found=found, allowed=allowed, action="give one for each channel")


class Source(Protocol):
    """Samples by their index."""

    def __len__(self) -> int: ...

    def read(self, indices: Sequence[int]) -> tuple[Array, ...]:
        """The samples at `indices`: one array `[B, ...]` for each model input."""

    def where(self, index: int) -> str:
        """Words for one sample."""


class Arrays:
    """A source over whole arrays, in memory or mapped from a file."""

    def __init__(self, arrays: Sequence[Array], name: str):
        self.arrays, self.name = tuple(arrays), name

    def __len__(self) -> int:
        return len(self.arrays[0])

    def read(self, indices: Sequence[int]) -> tuple[Array, ...]:
        return tuple(np.asarray(array[np.asarray(indices, np.int64)]) for array in self.arrays)

    def where(self, index: int) -> str:
        return f"sample {index} of '{self.name}'"


class ImageFolder:
    """A source over image files, decoded when they are read."""

    def __init__(self, files: Sequence[Path], spec: TensorSpec, options: ImageOptions):
        if len(spec.shape) != 4 or spec.shape[1] not in (1, 3, None) or not spec.dtype.startswith("float"):
            found = f"input '{spec.name}' {show_shape(spec.shape)} {spec.dtype}"
            allowed = "a float input [N, 1, H, W] or [N, 3, H, W]"
            raise InputError("the model takes no images", found=found, allowed=allowed, action="give the data as .npy or .npz")
        self.files, self.channels = tuple(files), spec.shape[1] or 3
        options.check_channels(self.channels)
        self.size = _image_size(spec, options)

    def __len__(self) -> int:
        return len(self.files)

    def read(self, indices: Sequence[int]) -> tuple[Array, ...]:
        return (np.stack([self._decode(self.files[i]) for i in indices]),)

    def where(self, index: int) -> str:
        return f"image '{self.files[index]}'"

    def _decode(self, path: Path) -> Array:
        image_module = pillow()
        try:
            with image_module.open(path) as image:
                image.load()
                if image.mode[0] in "IF":
                    raise InputError(f"cannot read the image '{path}'", found=f"pixels of mode {image.mode}", allowed="8-bit pixels")
                return shaped(np.asarray(image.convert("L" if self.channels == 1 else "RGB")), self.size)
        except InputError:
            raise
        except Exception as error:  # decoders raise many kinds for damaged files
            found = one_line(error).replace(f" '{path}'", "")
            raise InputError(f"cannot read the image '{path}'", found=found, action="remove it or replace it") from error


class Samples:
    """A source over an object with `__len__` and `__getitem__`, such as a torch Dataset: one sample at a time."""

    def __init__(self, dataset: Any, specs: Sequence[TensorSpec], name: str):
        self.dataset, self.specs, self.name = dataset, tuple(specs), name

    def __len__(self) -> int:
        return len(self.dataset)

    def read(self, indices: Sequence[int]) -> tuple[Array, ...]:
        items = [self.item(index)[0] for index in indices]
        columns = list(zip(*items, strict=True))
        for spec, column in zip(self.specs, columns, strict=True):
            for index, array in zip(indices, column, strict=True):
                if array.shape != column[0].shape or array.dtype != column[0].dtype:
                    found = f"{show_shape(array.shape)} {array.dtype} beside {show_shape(column[0].shape)} {column[0].dtype}"
                    what = f"{self.where(index)} for input '{spec.name}' differs from the others of its batch"
                    raise InputError(what, found=found, action="give all samples one shape and dtype")
        return tuple(np.stack(column) for column in columns)

    def item(self, index: int) -> tuple[list[Array], Any]:
        """The input arrays of one sample, without the batch dimension, and its label, which may be None."""
        try:
            value = self.dataset[index]
        except Exception as error:  # the user's own code may raise anything
            raise InputError(f"cannot read {self.where(index)}", found=one_line(error), action="mend the dataset") from error
        return split_item(value, self.specs, self.where(index))

    def labels(self, indices: Sequence[int]) -> Array | None:
        """The labels of the samples at `indices`; None where one has none. Reads every sample."""
        found = []
        for index in indices:
            label = label_array(self.item(index)[1])
            if label is None:
                return None
            found.append(label.reshape(-1))
        return np.concatenate(found)

    def where(self, index: int) -> str:
        return f"sample {index} of '{self.name}'"


def label_array(label: Any) -> Array | None:
    """A label as an array; None where it is no number, as the boxes of a detection data set."""
    return to_array(label, "a label") if isinstance(label, (int, np.generic, np.ndarray, torch.Tensor)) else None


def split_item(item: Any, specs: Sequence[TensorSpec], where: str) -> tuple[list[Array], Any]:
    """The input arrays of a sample or batch in the user's own form, and its label: `x`, `(x, label)`, `(x1, x2)` or a dict."""
    names = [spec.name for spec in specs]
    if isinstance(item, dict):
        if not set(names) <= item.keys():
            found = f"the keys {', '.join(map(repr, item))}"
            raise InputError(f"{where} lacks an input", found=found, allowed=", ".join(names), action="use the model's input names")
        return [to_array(item[name], f"{where}, '{name}'") for name in names], item.get("labels", item.get("label"))
    values = list(item) if isinstance(item, (tuple, list)) else [item]
    if len(values) not in (len(names), len(names) + 1):
        found = f"{len(values)} values"
        raise InputError(f"{where} has the wrong number of values", found=found, allowed=_counts(names), action="return these")
    arrays = [to_array(value, f"{where}, '{name}'") for name, value in zip(names, values, strict=False)]
    return arrays, values[len(names)] if len(values) > len(names) else None


def to_array(value: Any, where: str) -> Array:
    """An array of a tensor, array or number; `InputError` for anything else."""
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        value = (value.float() if value.dtype == torch.bfloat16 else value).numpy()
    if not isinstance(value, (np.ndarray, np.generic, int, float, list)):
        found = f"an object of type {type(value).__module__}.{type(value).__name__}"
        raise InputError(f"{where} is no array", found=found, allowed="a torch.Tensor or a NumPy array", action="convert it")
    try:
        array: Array = np.asarray(value)
        return array
    except ValueError as error:
        raise InputError(f"{where} is no array", found=one_line(error), action="give rows of one length") from error


def check(shape: Sequence[int], dtype: np.dtype[Any], spec: TensorSpec, options: ImageOptions, where: str) -> bool:
    """Whether an array `[B, ...]` of this shape and dtype holds 8-bit images; `InputError` if it does not fit `spec`."""
    try:
        wanted = np.dtype(spec.dtype)
        kinds = {"f": "f", "i": "iu", "u": "iu", "b": "b"}[wanted.kind]
    except (TypeError, KeyError):  # bfloat16, complex
        found, action = f"{spec.dtype} in '{spec.name}'", "call model.float() and export it again"
        raise InputError("the model takes numbers that data files cannot hold", found=found, action=action) from None
    images = dtype == np.uint8 and wanted.kind == "f" and len(spec.shape) == 4
    if not images and dtype.kind not in kinds:
        allowed = {"f": "floats, or uint8 images [N, H, W, C]", "b": "bool"}.get(wanted.kind, "integers")
        action = f"save the array as {spec.dtype}" + (", scaled as in the model's training" if wanted.kind == "f" else "")
        raise InputError(f"{where} has the wrong dtype for input '{spec.name}'", found=dtype, allowed=allowed, action=action)
    if images:
        channels = spec.shape[1]
        if len(shape) == 4 and (shape[3] == channels or (channels is None and shape[3] in (1, 3))):
            options.check_channels(shape[3])
            _image_size(spec, options, (shape[1], shape[2]))
            return True
        last = show_shape((None, *spec.shape[2:], spec.shape[1]))
        allowed = f"uint8 images {last}, or floats {show_shape((None, *spec.shape[1:]))}"
    else:
        if len(shape) == len(spec.shape) and all(b in (None, a) for a, b in zip(shape[1:], spec.shape[1:], strict=True)):
            return False
        allowed = show_shape((None, *spec.shape[1:]))
    found = f"{show_shape(shape)} {dtype}"
    raise InputError(f"{where} has the wrong shape for input '{spec.name}'", found=found, allowed=allowed, action="reshape the data")


def convert(array: Array, spec: TensorSpec, options: ImageOptions, where: str) -> torch.Tensor:
    """A batch of raw samples as the tensor that the model takes; raises `InputError` as `check` does."""
    images = check(array.shape, array.dtype, spec, options, where)
    if images:
        size = _image_size(spec, options, (array.shape[1], array.shape[2]))
        array = np.stack([shaped(image, size) for image in array]).astype(np.float32) / np.float32(255)
        array = (array - np.asarray(options.mean, np.float32)) / np.asarray(options.std, np.float32)
        array = array.transpose(0, 3, 1, 2)
    wanted = np.dtype(spec.dtype)
    if wanted.kind in "iu" and array.size and (array.min() < np.iinfo(wanted).min or array.max() > np.iinfo(wanted).max):
        found = f"{array.min()} to {array.max()}"
        raise InputError(f"{where} has numbers that {wanted} cannot hold", found=found, action="use smaller numbers")
    with np.errstate(over="ignore"):  # the caller looks for what became infinite
        return torch.from_numpy(np.array(array, dtype=wanted, order="C"))


def shaped(image: Array, size: tuple[int, int] | None) -> Array:
    """An 8-bit image `[H, W]` or `[H, W, C]` as `[H, W, C]`, resized bilinearly (with Pillow's antialiasing) to `size`."""
    if image.ndim == 2:
        image = image[:, :, None]
    if size is None or image.shape[:2] == size:
        return image
    image_module = pillow()
    picture = image_module.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)
    resized = np.asarray(picture.resize((size[1], size[0]), image_module.Resampling.BILINEAR))
    return resized if resized.ndim == 3 else resized[:, :, None]


def find_images(folder: Path) -> tuple[list[Path], NDArray[np.int64] | None]:
    """The images below `folder`, sorted by path, and their labels where each lies in one of several class folders, else None.

    Label i is the class folder that is i-th by name. Raises `InputError` where there are no images.
    """
    others: dict[str, int] = {}
    files = []
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for path in (Path(parent) / name for name in names if not name.startswith(".")):
            if path.suffix.lower() in IMAGE_SUFFIXES:
                files.append(path)
            else:
                others[path.suffix or "no suffix"] = others.get(path.suffix or "no suffix", 0) + 1
    if not files:
        found = ", ".join(f"{count} files with {suffix}" for suffix, count in sorted(others.items())) or "an empty folder"
        allowed = ", ".join(IMAGE_SUFFIXES)
        raise InputError(f"no images in the folder '{folder}'", found=found, allowed=allowed, action="name another folder")
    files.sort(key=lambda path: path.relative_to(folder).parts)
    parts = [path.relative_to(folder).parts for path in files]
    classes = sorted({part[0] for part in parts})
    if len(classes) < 2 or any(len(part) != 2 for part in parts):
        return files, None
    return files, np.array([classes.index(part[0]) for part in parts], np.int64)


def pillow() -> Any:
    """The module PIL.Image; `NotInstalledError` without Pillow."""
    try:
        from PIL import Image
    except ImportError as error:
        raise NotInstalledError("images need the package Pillow", action="pip install pillow") from error
    return Image


def read_failed(path: Path, what: str, error: Exception) -> InputError:
    """The error for a damaged data file."""
    return InputError(f"cannot read the data '{path}'", found=f"{what} ({one_line(error)})", action=COPY_AGAIN)


def _image_size(spec: TensorSpec, options: ImageOptions, own: tuple[int, int] | None = None) -> tuple[int, int]:
    """The height and width that images get: the model's, else those of the size option, else their own."""
    wanted = spec.shape[2:]
    if options.size is not None:
        if any(fixed not in (None, given) for fixed, given in zip(wanted, options.size, strict=True)):
            found = f"{options.size[0]}x{options.size[1]}"
            allowed = f"{wanted[0] or 'any'}x{wanted[1] or 'any'} (height x width), which input '{spec.name}' takes"
            raise OptionError("the image size does not fit the model", found=found, allowed=allowed, action="leave it out")
        return options.size
    height, width = (fixed or (own[i] if own else None) for i, fixed in enumerate(wanted))
    if height is None or width is None:
        found = f"input '{spec.name}' {show_shape(spec.shape)}"
        raise OptionError("the model takes images of any size, and none is given", found=found, action="give an image size")
    return height, width


def _counts(names: Sequence[str]) -> str:
    inputs = f"input{'s' * (len(names) > 1)} {', '.join(names)}"
    return f"{len(names)} ({inputs}) or {len(names) + 1} ({inputs}, label)"
