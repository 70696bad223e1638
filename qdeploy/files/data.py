"""Data from files: `open_data` checks what it can before any work, and `Data.batches` reads the samples batch by batch.

photos/                 a folder of images; class folders in it give the labels
x.npy                   one array for the model's one input; uint8 [N, H, W, C] are images
x.npz                   arrays named as the model's inputs, and `labels`
mine.py:make            a callable that returns arrays, a torch Dataset or DataLoader, or any iterable
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from qdeploy.core.errors import InputError, OptionError, one_line
from qdeploy.core.spec import TensorSpec, show_shape
from qdeploy.files.format import describe_kind, file_kind
from qdeploy.files.reference import call, is_reference, where
from qdeploy.files.samples import (
    IMAGE_SUFFIXES,
    Array,
    Arrays,
    ImageFolder,
    ImageOptions,
    Samples,
    Source,
    check,
    convert,
    find_images,
    label_array,
    read_failed,
    split_item,
    to_array,
)

__all__ = ["Data", "ImageOptions", "TensorSpec", "open_data"]

DATA_FILES = "a folder of images, an .npy or .npz file, or MODULE:CALLABLE"
_ONE_INPUT = ("images", "x", "data")  # keys that may name the only input of a model
_STREAM_LIMIT = 4 << 30  # bytes of an iterable that are kept in memory
_FIRST = 4  # samples that are read at once, so that a wrong folder fails early


class Data:
    """Samples for a model's inputs, and their int64 labels where known; read when `batches` comes to them."""

    def __init__(
        self,
        source: Source,
        inputs: Sequence[TensorSpec],
        images: ImageOptions,
        indices: Sequence[int],
        labels: NDArray[np.int64] | None,
    ):
        assert labels is None or len(labels) == len(indices), (labels, len(indices))
        self._source, self._inputs, self._images, self._indices = source, tuple(inputs), images, tuple(indices)
        self._labels = labels

    def __len__(self) -> int:
        return len(self._indices)

    @property
    def labels(self) -> NDArray[np.int64] | None:
        """The label of each sample, `[N]`. Those of a Dataset are read from its samples, at the first question."""
        if self._labels is None and isinstance(self._source, Samples):
            labels = self._source.labels(self._indices)
            self._labels = None if labels is None else _checked_labels(labels, len(self), f"'{self._source.name}'")
        return self._labels

    def batches(self, size: int, limit: int | None = None) -> Iterator[tuple[torch.Tensor, ...]]:
        """Tensors `[size, ...]`, one for each input, for all samples in order, or the first `limit`; the last may be shorter.

        Raises `InputError` at the batch with a sample that cannot be read, has another shape, or holds NaN or Inf.
        """
        assert size >= 1, size
        end = len(self) if limit is None else min(limit, len(self))
        for start in range(0, end, size):
            yield self._batch(self._indices[start : min(start + size, end)])

    def pick(self, n: int, seed: int) -> Data:
        """`n` samples drawn with a seeded permutation, in their own order; all of them where there are no more than `n`."""
        if n < 1:
            raise OptionError("the number of samples is wrong", found=n, allowed="1 or more")
        chosen = np.sort(np.random.default_rng(seed).permutation(len(self))[:n])
        labels = None if self._labels is None else self._labels[chosen]
        return Data(self._source, self._inputs, self._images, [self._indices[i] for i in chosen], labels)

    def _batch(self, indices: Sequence[int]) -> tuple[torch.Tensor, ...]:
        tensors = []
        for spec, array in zip(self._inputs, self._source.read(indices), strict=True):
            tensor = convert(array, spec, self._images, self._source.where(indices[0]))
            if tensor.is_floating_point():
                bad = (~torch.isfinite(tensor)).reshape(len(tensor), -1).any(1).nonzero()
                if len(bad):
                    index = indices[int(bad[0])]
                    found = f"{len(bad)} such sample{'s' * (len(bad) > 1)} in its batch, for input '{spec.name}'"
                    action = "remove it, or mend what made it"
                    raise InputError(f"{self._source.where(index)} holds NaN or Inf", found=found, action=action)
            tensors.append(tensor)
        return tuple(tensors)


def open_data(reference: str, inputs: Sequence[TensorSpec], images: ImageOptions | None = None, labels: str | None = None) -> Data:
    """The data that `reference` names, for a model with these `inputs`; `labels` names a label file that takes precedence.

    Raises `InputError` for what cannot be used as these inputs, `OptionError` for options that do not fit, and
    `NotInstalledError` for images without Pillow.
    """
    images = images or ImageOptions()
    source, own_labels = _open(reference, inputs, images)
    if len(source) == 0:
        raise InputError(f"'{reference}' holds no samples", found="0 samples", action="give at least one")
    if labels is not None:
        own_labels = _read_labels(Path(labels))
    name = labels if labels is not None else f"the labels of '{reference}'"
    checked = None if own_labels is None else _checked_labels(own_labels, len(source), name)
    data = Data(source, inputs, images, range(len(source)), checked)
    _check_first(source, inputs, images, reference)
    if not isinstance(source, Arrays):
        next(data.batches(1 if isinstance(source, Samples) else _FIRST, limit=_FIRST))
    return data


def array_specs(reference: str) -> tuple[TensorSpec, ...] | None:
    """The inputs that an .npy or .npz file fits, read off its arrays; None where `reference` is something else.

    Images, uint8 `[N, H, W, C]`, become float32 `[N, C, H, W]`. Raises `InputError` for a file that is missing or damaged, and
    for one without arrays of numbers.
    """
    path = Path(reference)
    if is_reference(reference) or path.is_dir():
        return None
    kind = file_kind(path, "data")
    if kind == "npy":
        arrays = {"x": _read_npy(path)}
    elif kind == "npz":
        arrays = {name: array for name, array in _read_npz(path).items() if name != "labels"}
    else:
        return None
    if not arrays:
        raise InputError(f"'{reference}' has no array for an input", found="labels only", action="save the inputs beside them")
    specs = []
    for name, array in arrays.items():
        if array.dtype.kind not in "fiub":
            what = f"'{reference}' has the wrong dtype" + (f" in '{name}'" if len(arrays) > 1 else "")
            raise InputError(what, found=array.dtype, allowed="floats, integers, bool", action="save numbers, such as float32")
        image = array.dtype == np.uint8 and array.ndim == 4
        shape = (array.shape[3], *array.shape[1:3]) if image else array.shape[1:]
        dtype = "float32" if image or array.dtype.kind == "f" else array.dtype.name
        specs.append(TensorSpec(name="x" if len(arrays) == 1 else name, shape=(None, *shape), dtype=dtype))
    return tuple(specs)


def _check_first(source: Source, inputs: Sequence[TensorSpec], images: ImageOptions, reference: str) -> None:
    """Check arrays, or the first sample of a Dataset, and that image options have something to work on."""
    if isinstance(source, Arrays):
        arrays = list(source.arrays)
    elif isinstance(source, Samples):
        arrays = [array[None] for array in source.item(0)[0]]
    else:
        return
    kinds = [check(a.shape, a.dtype, spec, images, f"'{reference}'") for spec, a in zip(inputs, arrays, strict=True)]
    if not any(kinds) and images != ImageOptions():
        found = f"arrays of {', '.join(str(array.dtype) for array in arrays)} in '{reference}'"
        action = "leave --mean, --std and the image size out"
        raise OptionError("--mean, --std and the image size are for 8-bit images", found=found, action=action)


def _open(reference: str, inputs: Sequence[TensorSpec], images: ImageOptions) -> tuple[Source, Any]:
    if is_reference(reference):
        return _from_callable(reference, inputs)
    path = Path(reference)
    if os.path.isdir(path):
        if len(inputs) != 1:
            found = f"{len(inputs)} inputs: {', '.join(spec.name for spec in inputs)}"
            action = "give an .npz file with an array for each input"
            raise InputError(f"a folder of images is one input, and the model has more: '{path}'", found=found, action=action)
        files, labels = find_images(path)
        return ImageFolder(files, inputs[0], images), labels
    kind = file_kind(path, "data")
    if kind == "npz":
        return _from_arrays(_read_npz(path), inputs, reference)
    if kind == "npy":
        return _from_arrays({"": _read_npy(path)}, inputs, reference)
    image = path.suffix.lower() in IMAGE_SUFFIXES
    found = "a single image" if image else describe_kind(kind)
    action = "name the folder that holds the images" if image else "name one of these"
    raise InputError(f"cannot read the data '{path}'", found=found, allowed=DATA_FILES, action=action)


def _from_arrays(arrays: dict[str, Array], inputs: Sequence[TensorSpec], reference: str) -> tuple[Source, Any]:
    """The arrays that are the inputs, by name or, for one input, by the usual keys; and the array `labels`."""
    names = [spec.name for spec in inputs]
    labels = None if "labels" in names else arrays.pop("labels", None)
    if not set(names) <= arrays.keys() and len(inputs) == 1:
        names = [key for key in _ONE_INPUT if key in arrays][:1] or (list(arrays) if len(arrays) == 1 else names)
    missing = [name for name in names if name not in arrays]
    if missing:
        near = get_close_matches(missing[0], list(arrays), n=1)
        keys = ", ".join(map(repr, arrays)) or "none but labels"
        found = f"the keys {keys}" if "" not in arrays else "one array"
        allowed = ", ".join(names) + (f", or one of {', '.join(_ONE_INPUT)}" if len(inputs) == 1 else "") + ", and labels"
        action = f"rename '{near[0]}' to '{missing[0]}'" if near else "save an .npz file with np.savez and these keys"
        raise InputError(f"'{reference}' has no array for input '{missing[0]}'", found=found, allowed=allowed, action=action)
    chosen = [arrays[name] for name in names]
    for spec, array in zip(inputs, chosen, strict=True):
        if array.ndim == 0 or len(array) != len(chosen[0]):
            found = ", ".join(f"'{name}' {show_shape(array.shape)}" for name, array in zip(names, chosen, strict=True))
            what = f"'{reference}' has another number of samples for input '{spec.name}'"
            raise InputError(what, found=found, action="give all inputs as many samples")
    return Arrays(chosen, reference), labels


def _from_callable(reference: str, inputs: Sequence[TensorSpec]) -> tuple[Source, Any]:
    result = call(reference, "--data")
    if isinstance(result, (np.ndarray, torch.Tensor)):
        return _from_arrays({"": to_array(result, f"'{reference}'")}, inputs, reference)
    if isinstance(result, dict):
        return _from_arrays({key: to_array(value, f"'{reference}', '{key}'") for key, value in result.items()}, inputs, reference)
    if isinstance(result, tuple) and all(isinstance(value, (np.ndarray, torch.Tensor)) for value in result):
        arrays, labels = split_item(result, inputs, f"what '{reference}' returned")
        named = {spec.name: array for spec, array in zip(inputs, arrays, strict=True)}
        return _from_arrays(named, inputs, reference)[0], labels
    if hasattr(result, "__getitem__") and hasattr(result, "__len__") and not isinstance(result, (str, bytes, list, tuple)):
        return Samples(result, inputs, reference), None
    return _from_iterable(result, inputs, reference)


def _from_iterable(result: Any, inputs: Sequence[TensorSpec], reference: str) -> tuple[Source, Any]:
    """All samples or batches of an iterable, kept in memory."""
    if isinstance(result, (str, bytes)) or not hasattr(result, "__iter__"):
        allowed = "arrays, (images, labels), a Dataset, a DataLoader, or an iterable of samples or batches"
        found = f"an object of type {type(result).__module__}.{type(result).__name__}"
        raise InputError(f"'{reference}' returned no data", found=found, allowed=allowed, action="return one of these")
    parts: list[list[Array]] = []
    labels: list[Array] = []
    held = 0
    for number, item in enumerate(_items(result, reference)):
        here = f"item {number} of '{reference}'"
        arrays, label = split_item(item, inputs, here)
        label = label_array(label)
        if all(array.ndim == len(spec.shape) - 1 for spec, array in zip(inputs, arrays, strict=True)):
            arrays = [array[None] for array in arrays]
        for spec, array in zip(inputs, arrays, strict=True):
            check(array.shape, array.dtype, spec, ImageOptions(), here)
        held += sum(array.nbytes for array in arrays)
        if held > _STREAM_LIMIT:
            action = "return fewer samples, or an object with __len__ and __getitem__ such as a torch Dataset"
            raise InputError(f"'{reference}' gives more than fits in memory", found=f"over {held >> 30} GiB", action=action)
        parts.append(arrays)
        labels += [] if label is None else [label.reshape(-1)]
    if not parts:
        raise InputError(f"'{reference}' holds no samples", found="an iterable without items", action="give at least one")
    columns = [_joined(column, f"'{reference}'") for column in zip(*parts, strict=True)]
    return Arrays(columns, reference), np.concatenate(labels) if labels else None


def _items(result: Any, reference: str) -> Iterator[Any]:
    try:
        yield from result
    except Exception as error:  # the user's own code may raise anything
        found = one_line(error) + where(error)
        raise InputError(f"'{reference}' raised an error while it gave its items", found=found, action="mend it") from error


def _joined(column: Sequence[Array], name: str) -> Array:
    shapes = {(array.shape[1:], array.dtype) for array in column}
    if len(shapes) > 1:
        found = ", ".join(sorted(f"{show_shape(shape)} {dtype}" for shape, dtype in shapes)[:4])
        raise InputError(f"{name} gives samples of several shapes", found=found, action="give all samples one shape and dtype")
    return np.concatenate(column)


def _read_npy(path: Path) -> Array:
    try:
        try:
            return np.asanyarray(np.load(path, mmap_mode="r", allow_pickle=False))
        except ValueError:  # an array without elements cannot be mapped
            return np.asarray(np.load(path, allow_pickle=False))
    except Exception as error:  # NumPy raises many kinds for damaged files
        raise _array_failed(path, "", error) from error


def _read_npz(path: Path) -> dict[str, Array]:
    arrays: dict[str, Array] = {}
    key = ""
    try:
        with np.load(path, allow_pickle=False) as archive:
            for key in archive.files:
                arrays[key] = archive[key]
                if not isinstance(arrays[key], np.ndarray):  # NumPy gives bytes for a part that is no array
                    raise ValueError(f"'{key}' is no array")
    except Exception as error:  # NumPy, zipfile and zlib raise many kinds for damaged files
        raise _array_failed(path, key, error) from error
    return arrays


def _array_failed(path: Path, key: str, error: Exception) -> InputError:
    if "object" in str(error).lower() and not isinstance(error, zipfile.BadZipFile):
        what = f"cannot read the data '{path}'" + (f", array '{key}'" if key else "")
        action = "save the array with a numeric dtype, such as float32"
        return InputError(what, found="an array of Python objects, which only unpickling could read", action=action)
    return read_failed(path, "a truncated or damaged array file", error)


def _read_labels(path: Path) -> Array:
    """Labels from an .npy or .npz file, or from a text file with one integer on each line."""
    kind = file_kind(path, "labels")
    if kind == "npy":
        return _read_npy(path)
    if kind == "npz":
        arrays = _read_npz(path)
        if "labels" not in arrays and len(arrays) != 1:
            found = f"the keys {', '.join(map(repr, arrays))}"
            raise InputError(f"'{path}' has no array 'labels'", found=found, allowed="labels", action="save it under this key")
        return arrays["labels"] if "labels" in arrays else next(iter(arrays.values()))
    if kind != "text":
        raise InputError(f"cannot read the labels '{path}'", found=describe_kind(kind), allowed=".npy, .npz, or text")
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except ValueError as error:
        raise InputError(f"cannot read the labels '{path}'", found=one_line(error), allowed="one integer on each line") from error
    numbers = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            numbers.append(int(np.int64(int(line))))
        except (ValueError, OverflowError):
            what = f"'{path}' line {number} is no label"
            raise InputError(what, found=repr(line[:40]), allowed="one integer on each line", action="mend the line") from None
    return np.array(numbers, np.int64)


def _checked_labels(labels: Any, samples: int, name: str) -> NDArray[np.int64]:
    array = to_array(labels, name)
    if array.dtype.kind not in "iu" or array.ndim != 1:
        found = f"{show_shape(array.shape)} {array.dtype}"
        action = "give class numbers, such as labels.argmax(1) of one-hot rows" if array.ndim == 2 else "give class numbers"
        raise InputError(f"{name}: the labels are wrong", found=found, allowed="integers [N]", action=action)
    if len(array) != samples:
        found = f"{len(array)} labels for {samples} samples"
        raise InputError(f"{name}: the number of labels is wrong", found=found, allowed=samples, action="give one for each sample")
    if array.size and array.min() < 0:
        action = "count classes from 0"
        raise InputError(f"{name}: a label is negative", found=array.min(), allowed="0 or more", action=action)
    return array.astype(np.int64)
