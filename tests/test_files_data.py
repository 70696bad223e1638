"""`open_data`: what each source gives, against numbers worked out here, and that every bad one is refused in words."""

from __future__ import annotations

import textwrap
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from qdeploy.core.errors import InputError, OptionError, QDeployError
from qdeploy.files import data as data_module
from qdeploy.files.data import Data, TensorSpec, open_data

SAMPLES = Path(__file__).resolve().parent.parent / "samples"
RGB = TensorSpec(name="pixels", shape=(None, 3, 4, 6), dtype="float32")
GRAY = TensorSpec(name="pixels", shape=(None, 1, 4, 6), dtype="float32")
ANY = TensorSpec(name="pixels", shape=(None, 3, None, None), dtype="float32")
ROW = TensorSpec(name="x", shape=(None, 3), dtype="float32")
IDS = TensorSpec(name="ids", shape=(None, 5), dtype="int64")
MASK = TensorSpec(name="mask", shape=(None, 5), dtype="bool")


def tensors(data: Data, size: int = 2, limit: int | None = None) -> list[torch.Tensor]:
    """All batches of each input, joined."""
    return [torch.cat(column) for column in zip(*data.batches(size, limit), strict=True)]


def refused(kind: type[QDeployError], words: Sequence[str], reference: object, *inputs: TensorSpec, **options: object) -> None:
    """Opening the data, or reading it, raises this very class with one line that has all these words."""
    with pytest.raises(QDeployError) as caught:
        list(open_data(str(reference), inputs or (ROW,), **options).batches(2))  # type: ignore[arg-type]
    message = str(caught.value)
    assert type(caught.value) is kind, message
    assert "\n" not in message
    assert not [word for word in words if word not in message], message


def save_image(path: Path, height: int = 4, width: int = 6, value: object = (10, 20, 30), mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (width, height), value).save(path)  # type: ignore[arg-type]


def source_file(folder: Path, text: str) -> str:
    (folder / "mine.py").write_text("import numpy as np\nimport torch\n" + textwrap.dedent(text))
    return f"{folder / 'mine.py'}:make"


def test_samples() -> None:
    images = TensorSpec(name="images", shape=(None, 1, 8, 8), dtype="float32")
    data = open_data(str(SAMPLES / "digits_test.npz"), [images])
    stored = np.load(SAMPLES / "digits_test.npz")
    assert len(data) == 450
    assert data.labels is not None
    assert np.array_equal(data.labels, stored["labels"])
    batches = list(data.batches(64, limit=100))
    assert [len(batch[0]) for batch in batches] == [64, 36]
    assert np.array_equal(torch.cat([batch[0] for batch in batches]), stored["images"][:100])


def test_pick_is_seeded_ordered_and_keeps_labels(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=np.arange(60, dtype=np.float32).reshape(20, 3), labels=np.arange(20))
    data = open_data(str(tmp_path / "d.npz"), [ROW])
    picked = data.pick(7, seed=3)
    assert picked.labels is not None
    rows = tensors(picked)[0]
    assert len(picked) == len(rows) == 7
    assert rows[:, 0].tolist() == [3.0 * label for label in picked.labels]
    assert picked.labels.tolist() == sorted(set(picked.labels.tolist()))
    assert picked.labels.tolist() == data.pick(7, seed=3).labels.tolist()  # type: ignore[union-attr]
    assert picked.labels.tolist() != data.pick(7, seed=4).labels.tolist()  # type: ignore[union-attr]
    assert set(picked.pick(2, seed=0).labels.tolist()) < set(picked.labels.tolist())  # type: ignore[union-attr]
    assert len(data.pick(99, seed=0)) == 20
    with pytest.raises(OptionError, match="number of samples"):
        data.pick(0, seed=0)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_npy_of_floats_by_content(tmp_path: Path, dtype: str) -> None:
    array = np.arange(15).reshape(5, 3).astype(dtype)
    with (tmp_path / "x.npz").open("wb") as file:  # the suffix lies
        np.save(file, np.asfortranarray(array))
    (x,) = tensors(open_data(str(tmp_path / "x.npz"), [ROW]))
    assert x.dtype == torch.float32
    assert np.array_equal(x, array)


@pytest.mark.parametrize("key", ["images", "x", "data", "anything"])
def test_npz_keys_of_one_input(tmp_path: Path, key: str) -> None:
    spec = TensorSpec(name="input_1", shape=(None, 3), dtype="float32")
    np.savez_compressed(tmp_path / "d", **{key: np.ones((4, 3)), "labels": np.arange(4, dtype=np.uint8)})
    (tmp_path / "d.npz").rename(tmp_path / "d.npy")
    data = open_data(str(tmp_path / "d.npy"), [spec])
    assert tensors(data)[0].shape == (4, 3)
    assert data.labels is not None
    assert data.labels.dtype == np.int64


def test_npz_of_two_inputs(tmp_path: Path) -> None:
    path = tmp_path / "d.npz"
    np.savez(path, mask=np.ones((4, 5), bool), ids=np.arange(20, dtype=np.int32).reshape(4, 5))
    ids, mask = tensors(open_data(str(path), [IDS, MASK]), size=3)
    assert (ids.dtype, mask.dtype) == (torch.int64, torch.bool)
    assert ids.flatten().tolist() == list(range(20))
    np.savez(path, mask=np.ones((4, 5), bool), idx=np.ones((4, 5), int))
    refused(InputError, ["'ids'", "'mask', 'idx'", "ids, mask", "rename 'idx' to 'ids'"], path, IDS, MASK)
    np.savez(path, mask=np.ones((4, 5), bool), ids=np.ones((3, 5), int))
    refused(InputError, ["number of samples", "'ids' [3, 5], 'mask' [4, 5]"], path, IDS, MASK)
    refused(InputError, ["'x'", "'mask', 'ids'", "images, x, data"], path, ROW)
    np.save(tmp_path / "one.npy", np.ones((3, 5), int))
    refused(InputError, ["'ids'", "one array", "np.savez"], tmp_path / "one.npy", IDS, MASK)


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.zeros((4, 2), np.float32), ["wrong shape", "[4, 2] float32", "[N, 3]"]),
        (np.zeros(3, np.float32), ["wrong shape", "[3]", "[N, 3]"]),
        (np.zeros((4, 3, 1)), ["wrong shape", "[4, 3, 1]"]),
        (np.float32(1), ["[]"]),
        (np.zeros((0, 3), np.float32), ["no samples", "0 samples"]),
        (np.zeros((4, 3), np.int64), ["wrong dtype", "int64", "float32"]),
        (np.zeros((4, 3), np.uint8), ["wrong dtype", "uint8"]),
        (np.zeros((4, 3), np.complex64), ["wrong dtype", "complex64"]),
        (np.full((4, 3), "a"), ["wrong dtype", "<U1"]),
        (np.full((4, 3), None), ["Python objects", "numeric dtype"]),
        (np.array([[0, 0, 0], [0, 0, 0], [0, np.nan, 0.0]]), ["sample 2 of", "NaN or Inf", "'x'"]),
        (np.array([[0, 0, 0], [0, -np.inf, 0.0]]), ["sample 1 of", "NaN or Inf"]),
        (np.array([[0, 0, 1e300]]), ["sample 0 of", "NaN or Inf"]),
    ],
)
def test_bad_arrays(tmp_path: Path, array: np.ndarray, words: list[str]) -> None:
    np.save(tmp_path / "x.npy", array)
    refused(InputError, ["x.npy", "to do: ", *words], tmp_path / "x.npy")
    np.savez(tmp_path / "x.npz", x=array)
    refused(InputError, ["x.npz", "to do: ", *words], tmp_path / "x.npz")


def test_integers_out_of_range(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.full((2, 5), 300))
    spec = TensorSpec(name="b", shape=(None, 5), dtype="uint8")
    refused(InputError, ["uint8 cannot hold", "300"], tmp_path / "x.npy", spec)
    refused(InputError, ["wrong dtype", "int64", "bool"], tmp_path / "x.npy", MASK)
    np.save(tmp_path / "f.npy", np.zeros((2, 5)))
    refused(InputError, ["wrong dtype", "float64", "integers"], tmp_path / "f.npy", IDS)


@pytest.mark.parametrize("suffix", ["npy", "npz"])
def test_every_truncation_is_refused(tmp_path: Path, suffix: str) -> None:
    np.savez_compressed(tmp_path / "whole.npz", x=np.random.default_rng(0).random((50, 3)))
    np.save(tmp_path / "whole.npy", np.zeros((50, 3)))
    content = (tmp_path / f"whole.{suffix}").read_bytes()
    path = tmp_path / f"cut.{suffix}"
    for length in range(0, len(content), 37):
        path.write_bytes(content[:length])
        refused(InputError, ["cut", "to do: "], path)
    if suffix == "npz":
        with zipfile.ZipFile(tmp_path / "odd.npz", "w") as archive:
            archive.writestr("x.npy", b"no array")
        refused(InputError, ["odd.npz", "'x' is no array"], tmp_path / "odd.npz")
        path.write_bytes(content[:200] + bytes([content[200] ^ 1]) + content[201:])
        refused(InputError, ["cut", "to do: "], path)


def test_folders_that_cannot_be_used(tmp_path: Path) -> None:
    refused(InputError, [str(tmp_path), "no images", "an empty folder", ".png"], tmp_path, RGB)
    (tmp_path / "a.txt").touch()
    (tmp_path / "b.tiff").touch()
    refused(InputError, ["no images", "1 files with .tiff", "1 files with .txt"], tmp_path, RGB)
    save_image(tmp_path / "c.png")
    refused(InputError, ["takes no images", "'x' [N, 3] float32", ".npy"], tmp_path, ROW)
    refused(InputError, ["2 inputs: ids, mask", ".npz"], tmp_path, IDS, MASK)
    refused(InputError, ["no data file", "none.npy", "c.png"], tmp_path / "none.npy")
    refused(InputError, ["no data file"], "x" * 5000)
    refused(InputError, ["a text file", ".npz", "MODULE:CALLABLE"], _text(tmp_path, "hello"))
    refused(InputError, ["a single image", "name the folder"], tmp_path / "c.png", RGB)
    refused(InputError, ["a PyTorch model or pickle file"], SAMPLES / "digits.pt2", RGB)


def _text(folder: Path, text: str) -> Path:
    (folder / "t.txt").write_text(text)
    return folder / "t.txt"


def test_label_files(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", x=np.zeros((3, 3)), labels=[9, 9, 9])
    np.save(tmp_path / "l.npy", np.array([2, 0, 1], np.int16))
    np.savez(tmp_path / "l.npz", labels=[2, 0, 1], names=["a"])
    np.savez(tmp_path / "one.npz", any=[2, 0, 1])
    for labels in (tmp_path / "l.npy", tmp_path / "l.npz", tmp_path / "one.npz", _text(tmp_path, "2\n 0 \r\n1\n\n")):
        found = open_data(str(tmp_path / "x.npz"), [ROW], labels=str(labels)).labels
        assert found is not None
        assert found.tolist() == [2, 0, 1]
        assert found.dtype == np.int64


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (np.zeros(2, int), ["2 labels for 3 samples", "allowed: 3"]),
        (np.zeros(3), ["[3] float64", "integers"]),
        (np.zeros(3, bool), ["bool", "integers"]),
        (np.eye(3, dtype=int), ["[3, 3]", "argmax(1)"]),
        (np.array([0, -1, 2]), ["negative", "-1"]),
        (np.array(["a", "b", "c"]), ["<U1", "integers"]),
        (np.array([None] * 3), ["Python objects"]),
        ("1\ntwo\n3\n", ["line 2", "'two'", "one integer on each line"]),
        ("1\n2.5\n3\n", ["line 2", "'2.5'"]),
        ("1\n2\n99999999999999999999\n", ["line 3"]),
        ("1\n2\n", ["2 labels for 3 samples"]),
        (" \n", ["0 labels for 3 samples"]),
        ("", ["empty file"]),
    ],
)
def test_bad_labels(tmp_path: Path, labels: np.ndarray | str, words: list[str]) -> None:
    np.savez(tmp_path / "x.npz", x=np.zeros((3, 3)))
    path = tmp_path / "l.npy"
    path.write_text(labels) if isinstance(labels, str) else np.save(path, labels)
    refused(InputError, ["l.npy", *words], tmp_path / "x.npz", labels=str(path))
    refused(InputError, ["no labels file", "none.txt"], tmp_path / "x.npz", labels=str(tmp_path / "none.txt"))
    if not isinstance(labels, str) and labels.dtype != object:
        np.savez(tmp_path / "x.npz", x=np.zeros((3, 3)), labels=labels)
        refused(InputError, ["the labels of", "x.npz", *words], tmp_path / "x.npz")


CALLABLES = {
    "tensor": "return torch.arange(12.).reshape(4, 3)",
    "array": "return np.arange(12.).reshape(4, 3)",
    "images and labels": "return torch.arange(12.).reshape(4, 3), torch.tensor([0, 1, 2, 3])",
    "dict": "return {'x': np.arange(12.).reshape(4, 3), 'labels': np.arange(4)}",
    "samples": "return (torch.arange(3.) + 3 * i for i in range(4))",
    "labelled samples": "return [(torch.arange(3.) + 3 * i, i) for i in range(4)]",
    "batches": "return iter([torch.arange(9.).reshape(3, 3), torch.arange(9., 12.).reshape(1, 3)])",
    "dicts": "return [{'x': torch.arange(3.) + 3 * i, 'label': torch.tensor(i)} for i in range(4)]",
    "detection": "return [(torch.arange(3.) + 3 * i, {'boxes': []}) for i in range(4)]",
    "bfloat16": "return torch.arange(12.).reshape(4, 3).bfloat16()",
    "dataset with labels": "return torch.utils.data.TensorDataset(torch.arange(12.).reshape(4, 3), torch.arange(4))",
    "loader with labels": """
        dataset = torch.utils.data.TensorDataset(torch.arange(12.).reshape(4, 3), torch.arange(4))
        return torch.utils.data.DataLoader(dataset, batch_size=3)
    """,
}


@pytest.mark.parametrize("name", CALLABLES)
def test_callables(tmp_path: Path, name: str) -> None:
    body = textwrap.indent(textwrap.dedent(CALLABLES[name]).strip(), "    ")
    data = open_data(source_file(tmp_path, f"def make():\n{body}\n"), [ROW])
    assert len(data) == 4
    assert tensors(data, 3)[0].tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]
    if "label" in name or name.startswith("dict"):
        assert data.labels is not None
        assert data.labels.tolist() == [0, 1, 2, 3]
        picked = data.pick(2, seed=0)
        assert picked.labels is not None
        assert (tensors(picked)[0][:, 0] / 3).tolist() == picked.labels.tolist()
    else:
        assert data.labels is None


def test_dataset_is_read_as_needed_and_images_are_converted(tmp_path: Path) -> None:
    text = """
        class Images(torch.utils.data.Dataset):
            def __len__(self): return 1_000_000
            def __getitem__(self, i): return np.full((4, 6, 3), i % 256, np.uint8)
        make = Images
    """
    data = open_data(source_file(tmp_path, text), [RGB])
    (x,) = tensors(data.pick(3, seed=1))
    picked = np.sort(np.random.default_rng(1).permutation(1_000_000)[:3])
    np.testing.assert_allclose(x[:, 0, 0, 0], (picked % 256) / 255, atol=1e-6)


def test_callable_of_two_inputs(tmp_path: Path) -> None:
    made = source_file(tmp_path, "def make(): return [(torch.ones(5, dtype=int) * i, torch.ones(5) > 0, i) for i in range(3)]")
    data = open_data(made, [IDS, MASK])
    assert data.labels is not None
    assert data.labels.tolist() == [0, 1, 2]
    assert tensors(data)[0][:, 0].tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("return 7", ["returned no data", "builtins.int", "Dataset"]),
        ("return 'photos'", ["returned no data", "builtins.str"]),
        ("return []", ["no samples"]),
        ("return torch.zeros(0, 3)", ["no samples"]),
        ("return torch.zeros(2, 4)", ["wrong shape", "[2, 4]", "[N, 3]"]),
        ("return ['a', 'b']", ["item 0", "builtins.str", "torch.Tensor"]),
        ("return [torch.zeros(3), torch.zeros(4)]", ["item 1", "wrong shape", "[1, 4]"]),
        ("return [torch.zeros(3), torch.zeros(3).double()]", ["several shapes", "float64"]),
        ("return [torch.zeros(3, dtype=int)]", ["item 0", "wrong dtype", "int64"]),
        ("return [(torch.zeros(3), 1, 2)]", ["item 0", "3 values", "1 (input x) or 2 (input x, label)"]),
        ("return [{'y': torch.zeros(3)}]", ["item 0", "'y'", "allowed: x"]),
        ("return torch.zeros(3, 3), torch.zeros(2, dtype=int)", ["2 labels for 3 samples"]),
        ("return (1 / i for i in [0])", ["ZeroDivisionError", "mine.py' line 4"]),
        ("return {}['no']", ["KeyError", "mine.py' line 4"]),
        ("return [torch.tensor([0, 0, float('nan')])]", ["sample 0 of", "NaN or Inf"]),
    ],
)
def test_bad_callables(tmp_path: Path, body: str, words: list[str]) -> None:
    made = source_file(tmp_path, f"def make():\n    {body}\n")
    refused(InputError, ["mine.py:make", *words, "to do: "], made)


def test_bad_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = """
        class Odd:
            def __len__(self): return 5
            def __getitem__(self, i):
                if i == 4: raise KeyError(i)
                return torch.zeros(3) if i < 3 else torch.zeros(4)
        def make(): return Odd()
        def endless():
            while True: yield torch.zeros(3)
    """
    made = source_file(tmp_path, text)
    batches = open_data(made, [ROW]).batches(2)
    next(batches)
    with pytest.raises(InputError, match=r"sample 3 of .*\[4\] float32 beside \[3\] float32"):
        open_data(made, [ROW])._batch([2, 3])
    with pytest.raises(InputError, match=r"cannot read sample 4 of .*KeyError: 4"):
        open_data(made, [ROW])._batch([4])
    monkeypatch.setattr(data_module, "_STREAM_LIMIT", 1000)
    refused(InputError, ["more than fits in memory", "__getitem__"], made.replace(":make", ":endless"))
    refused(OptionError, ["--data", "mkae", "did you mean 'make'?"], made.replace(":make", ":mkae"))
