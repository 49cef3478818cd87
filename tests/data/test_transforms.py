"""Crop rules against their definitions in other words or libraries, and images of every mode."""

import numpy as np
import pytest
import torch
from PIL import Image

from ldmlab.data.transforms import RULES, Transform, parse_colour, to_rgb
from ldmlab.errors import InputError


def _noise(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("rule", sorted(set(RULES) - {"keep", "short_side"}))
@pytest.mark.parametrize("shape", [(300, 200), (201, 333), (64, 64), (20, 90), (1, 1)])
def test_square_of_the_size_asked(rule: str, shape: tuple[int, int]) -> None:
    image = Transform(64, rule)(_noise(*shape))
    assert (image.mode, image.size) == ("RGB", (64, 64))
    flat = Transform(64, rule)(Image.new("RGB", shape, (10, 200, 30)))
    assert np.array_equal(np.unique(np.asarray(flat).reshape(-1, 3), axis=0), [[10, 200, 30]])


@pytest.mark.parametrize("shape", [(300, 200), (256, 257), (100, 150), (1024, 1024)])
def test_bilinear_without_antialiasing_is_torchs(shape: tuple[int, int]) -> None:
    """torch's bilinear with half-pixel centres and no antialiasing is an independent reading of the same rule."""
    image, size = _noise(*shape), 64
    scale = size / min(shape)
    height, width = round(shape[1] * scale), round(shape[0] * scale)
    pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None].double()
    resized = torch.nn.functional.interpolate(pixels, (height, width), mode="bilinear", antialias=False)
    top, left = (height - size) // 2, (width - size) // 2
    expected = resized[0, :, top : top + size, left : left + size].permute(1, 2, 0).numpy()
    got = np.asarray(Transform(size, "short_side_bilinear_no_antialias")(image)).astype(np.float64)
    assert np.abs(got - expected).max() <= 0.51  # rounding to bytes


def test_lsun_is_the_centre_square_then_bicubic() -> None:
    image = _noise(300, 200)
    expected = image.crop((50, 0, 250, 200)).resize((64, 64), Image.Resampling.BICUBIC)
    assert Transform(64, "lsun")(image).tobytes() == expected.tobytes()


def test_adm_halves_exactly_before_bicubic() -> None:
    image = _noise(512, 300)
    halved = np.asarray(image).astype(np.float64).reshape(150, 2, 256, 2, 3).mean((1, 3))  # 300 => 150, still >= 2 x 64
    halved = np.floor(halved + 0.5).reshape(75, 2, 128, 2, 3).mean((1, 3))
    small = Image.fromarray(np.floor(halved + 0.5).astype(np.uint8)).resize((109, 64), Image.Resampling.BICUBIC)
    expected = np.asarray(small.crop((22, 0, 86, 64))).astype(int)
    assert np.abs(np.asarray(Transform(64, "adm")(image)).astype(int) - expected).max() <= 3  # Pillow rounds six times
    assert np.abs(np.asarray(Transform(64, "centre")(image)).astype(int) - expected).max() > 10


def test_area_is_the_mean_over_whole_blocks() -> None:
    image = _noise(320, 256)
    square = np.asarray(image)[:, 32:288].astype(np.float64)
    expected = square.reshape(64, 4, 64, 4, 3).mean((1, 3))
    got = np.asarray(Transform(64, "sr3_area")(image)).astype(np.float64)
    assert np.abs(got - expected).max() <= 0.51


def test_area_keeps_the_mean_for_odd_ratios() -> None:
    image = _noise(101, 101)
    got = np.asarray(Transform(64, "sr3_area")(image)).astype(np.float64)
    assert abs(got.mean() - np.asarray(image).astype(np.float64).mean()) < 0.1


def test_centre_is_antialiased_and_short_side_keeps_the_rest() -> None:
    stripes = Image.fromarray(np.tile(np.array([[0, 255]], dtype=np.uint8), (256, 128))).convert("RGB")
    assert np.asarray(Transform(32, "centre")(stripes)).std() < 3
    assert Transform(64, "short_side")(_noise(300, 200)).size == (96, 64)
    assert Transform(None, "keep")(_noise(30, 20)).size == (30, 20)


def test_refusals() -> None:
    with pytest.raises(InputError, match="crop=middle"):
        Transform(64, "middle")
    with pytest.raises(InputError, match="size=0"):
        Transform(0)
    with pytest.raises(InputError, match="size=64"):
        Transform(64, "keep")
    with pytest.raises(InputError, match="background=blurple"):
        parse_colour("blurple")
    assert parse_colour("1,2,3") == (1, 2, 3)
    assert parse_colour("#ff8000") == (255, 128, 0)


def test_transparent_pixels_take_the_background() -> None:
    image = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    image.putpixel((0, 0), (200, 0, 0, 255))
    image.putpixel((1, 0), (255, 255, 255, 128))
    rgb = to_rgb(image, (0, 0, 255))
    assert [rgb.getpixel((x, 0)) for x in range(3)] == [(200, 0, 0), (128, 128, 255), (0, 0, 255)]


def test_palette_with_a_transparent_entry() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 255, 0])
    image.putpixel((1, 0), 1)
    image.info["transparency"] = 1
    assert [to_rgb(image, (1, 2, 3)).getpixel((x, 0)) for x in range(2)] == [(255, 0, 0), (1, 2, 3)]


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    values = np.array([[0, 257, 32768, 65535]], dtype=np.uint16)
    assert np.asarray(to_rgb(Image.fromarray(values)))[0, :, 0].tolist() == [0, 1, 128, 255]
    assert np.asarray(to_rgb(Image.fromarray(values.astype(np.int32))))[0, :, 0].tolist() == [0, 1, 128, 255]
    assert np.asarray(to_rgb(Image.fromarray(np.array([[0, 0.5, 1]], dtype=np.float32))))[0, :, 0].tolist() == [
        0,
        128,
        255,
    ]
    with pytest.raises(ValueError, match="outside 0"):
        to_rgb(Image.fromarray(np.array([[0, 7]], dtype=np.float32)))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "HSV"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    image = Image.new("RGB", (8, 8), "white").convert(mode) if mode != "LAB" else Image.new("LAB", (8, 8))
    rgb = to_rgb(image)
    assert rgb.mode == "RGB"
    if mode != "LAB":
        assert rgb.getpixel((0, 0)) == (255, 255, 255)


def test_exif_rotation_is_undone(tmp_path: pytest.TempPathFactory) -> None:
    image = Image.new("RGB", (20, 10), "white")
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its side
    image.save(f"{tmp_path}/a.jpg", exif=exif)
    with Image.open(f"{tmp_path}/a.jpg") as opened:
        assert to_rgb(opened).size == (10, 20)


def test_first_frame_of_an_animation(tmp_path: pytest.TempPathFactory) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    for ending in ("gif", "webp", "png"):
        frames[0].save(f"{tmp_path}/a.{ending}", save_all=True, append_images=frames[1:])
        with Image.open(f"{tmp_path}/a.{ending}") as opened:
            opened.seek(1)
            red, _, blue = to_rgb(opened).getpixel((0, 0))  # type: ignore[misc]
        assert red > 250
        assert blue < 5
