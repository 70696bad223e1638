"""Images as samples: what folders and 8-bit arrays give, against numbers worked out here, and what is refused."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_files_data import ANY, GRAY, RGB, ROW, refused, save_image, source_file, tensors

from qdeploy.core.errors import InputError, NotInstalledError, OptionError
from qdeploy.files.data import ImageOptions, open_data


def test_folder_with_classes(tmp_path: Path) -> None:
    save_image(tmp_path / "dog" / "b.png", value=(0, 0, 255))
    save_image(tmp_path / "cat" / "z.PNG", value=(255, 0, 0))
    save_image(tmp_path / "cat" / "a.bmp", value=(0, 255, 0))
    (tmp_path / "cat" / ".hidden.png").write_bytes(b"no image")
    (tmp_path / "notes.txt").write_text("not an image")
    data = open_data(str(tmp_path), [RGB], ImageOptions(mean=(0.5, 0, 0), std=(0.5, 1, 2)))
    assert data.labels is not None
    assert data.labels.tolist() == [0, 0, 1]
    (x,) = tensors(data)
    assert x.shape == (3, 3, 4, 6)
    assert x[:, :, 1, 2].tolist() == [[-1, 1, 0], [1, 0, 0], [-1, 0, 0.5]]
    save_image(tmp_path / "top.png")
    assert open_data(str(tmp_path), [RGB]).labels is None


@pytest.mark.parametrize("suffix", ["png", "jpg", "jpeg", "bmp", "webp"])
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P"])
def test_image_formats(tmp_path: Path, suffix: str, mode: str) -> None:
    image = Image.new("RGB", (6, 4), (100, 100, 100)).convert(mode if suffix in ("png", "webp") else "RGB")
    image.save(tmp_path / f"a.{suffix}")
    for spec in (RGB, GRAY):
        (x,) = tensors(open_data(str(tmp_path), [spec]))
        assert x.shape == (1, *spec.shape[1:])
        assert (x - 100 / 255).abs().max() <= 3 / 255


def test_resize_is_bilinear_and_height_comes_first(tmp_path: Path) -> None:
    pixels = np.arange(8 * 12, dtype=np.uint8).reshape(8, 12)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    expected = np.asarray(Image.fromarray(pixels).resize((6, 4), Image.Resampling.BILINEAR)) / 255
    (model,) = tensors(open_data(str(tmp_path), [GRAY]))
    (option,) = tensors(open_data(str(tmp_path), [ANY], ImageOptions(size=(4, 6))))
    np.testing.assert_allclose(model[0, 0], expected, atol=1e-6)
    np.testing.assert_allclose(option[0, 2], expected, atol=1e-6)
    refused(OptionError, ["any size", "give an image size"], tmp_path, ANY)
    refused(OptionError, ["5x5", "4x6", "leave it out"], tmp_path, GRAY, images=ImageOptions(size=(5, 5)))


def test_npy_of_8_bit_images(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (5, 4, 6, 3), np.uint8)
    np.save(tmp_path / "x.npy", images)
    data = open_data(str(tmp_path / "x.npy"), [RGB], ImageOptions(mean=(0.1, 0.2, 0.3), std=(0.5,)))
    expected = (images.transpose(0, 3, 1, 2) / 255 - np.array([0.1, 0.2, 0.3]).reshape(3, 1, 1)) / 0.5
    np.testing.assert_allclose(tensors(data)[0], expected, atol=1e-5)
    np.save(tmp_path / "big.npy", np.full((2, 9, 9, 3), 51, np.uint8))
    assert tensors(open_data(str(tmp_path / "big.npy"), [RGB]))[0].unique().tolist() == [np.float32(0.2)]
    np.save(tmp_path / "chw.npy", images.transpose(0, 3, 1, 2))
    refused(InputError, ["chw.npy", "[5, 3, 4, 6] uint8", "[N, 4, 6, 3]"], tmp_path / "chw.npy", RGB)
    refused(OptionError, ["--mean", "2 numbers", "3 channels"], tmp_path / "x.npy", RGB, images=ImageOptions(mean=(0, 0)))


def test_damaged_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(6):
        save_image(tmp_path / f"{i}.png", 40, 60)
    whole = (tmp_path / "0.png").read_bytes()
    (tmp_path / "5.png").write_bytes(whole[: len(whole) // 2])
    data = open_data(str(tmp_path), [RGB])  # the damaged one is not among the first
    batches = data.batches(2)
    next(batches), next(batches)
    with pytest.raises(InputError, match=r"cannot read the image '.*5\.png'.*to do: remove it"):
        next(batches)
    (tmp_path / "0.png").write_bytes(b"no image at all")
    refused(InputError, ["0.png", "UnidentifiedImageError"], tmp_path, RGB)
    Image.fromarray(np.zeros((4, 6), np.uint16)).save(tmp_path / "0.png")
    refused(InputError, ["0.png", "mode I;16", "8-bit"], tmp_path, RGB)
    monkeypatch.setitem(sys.modules, "PIL", None)
    refused(NotInstalledError, ["Pillow", "pip install pillow"], tmp_path, RGB)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"std": (0.0,)}, ["--std", "above 0"]),
        ({"std": (1.0, -1.0, 1.0)}, ["--std", "above 0"]),
        ({"mean": (float("nan"),)}, ["--mean", "finite"]),
        ({"mean": ()}, ["--mean", "finite"]),
        ({"size": (0, 4)}, ["image size", "at least 1"]),
    ],
)
def test_bad_image_options(options: dict[str, tuple[float, ...]], words: list[str]) -> None:
    with pytest.raises(OptionError) as caught:
        ImageOptions(**options)  # type: ignore[arg-type]
    assert not [word for word in words if word not in str(caught.value)], caught.value


def test_image_options_that_do_not_fit(tmp_path: Path) -> None:
    save_image(tmp_path / "c.png")
    refused(OptionError, ["--std", "2 numbers", "1 channel", "1 number"], tmp_path, GRAY, images=ImageOptions(std=(1, 1)))
    np.save(tmp_path / "x.npy", np.zeros((2, 3)))
    options = ImageOptions(mean=(0.5,))
    refused(OptionError, ["--mean", "float64", "x.npy", "leave"], tmp_path / "x.npy", ROW, images=options)
    made = source_file(tmp_path, "def make(): return torch.utils.data.TensorDataset(torch.zeros(2, 3))")
    refused(OptionError, ["--mean", "float32", "leave"], made, ROW, images=options)
