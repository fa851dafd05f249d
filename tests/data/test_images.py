"""Decoding, crops and their coordinates, buckets."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from diffalign.data.images import (
    UndecodableImage,
    buckets,
    decode,
    nearest_bucket,
    pair_bucket,
    plan_crop,
    to_tensor,
    transform,
)
from diffalign.errors import ConfigError


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def coordinates(height: int, width: int) -> Image.Image:
    """Red is the pixel's x, green its y."""
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([x, y, np.zeros_like(x)], axis=-1).astype(np.uint8))


def at(pixels: torch.Tensor, y: int, x: int) -> tuple[int, int]:
    """The (y, x) that the colour of a `coordinates` pixel says."""
    red, green, _ = ((pixels[:, y, x] + 1) * 127.5).round().int().tolist()
    return green, red


def test_crop_coordinates_are_where_the_pixels_come_from() -> None:
    # Wider than the target: the crop moves along x only. Heights match, so nothing is resized.
    wide = transform(coordinates(32, 100), (32, 32))
    assert (wide.original_size, wide.crop_top_left, wide.target_size) == ((32, 100), (0, 34), (32, 32))
    assert at(wide.pixels, 0, 0) == wide.crop_top_left
    assert at(wide.pixels, 5, 7) == (5, 41)
    tall = transform(coordinates(100, 32), (32, 32))
    assert (tall.original_size, tall.crop_top_left) == ((100, 32), (34, 0))
    assert at(tall.pixels, 0, 0) == (34, 0)


def test_random_crops_tell_the_truth_and_follow_the_generator() -> None:
    def draw(seed: int) -> tuple[int, int]:
        generator = torch.Generator().manual_seed(seed)
        cut = transform(coordinates(32, 100), (32, 32), crop="random", generator=generator)
        assert at(cut.pixels, 0, 0) == cut.crop_top_left
        return cut.crop_top_left

    seen = {draw(seed) for seed in range(20)}
    assert draw(3) == draw(3)
    assert len(seen) > 10
    assert min(x for _, x in seen) >= 0
    assert max(x for _, x in seen) <= 68


def test_offsets_count_in_the_resized_image() -> None:
    plan = plan_crop((200, 100), (64, 64))
    assert (plan.resized, plan.top_left) == ((128, 64), (32, 0))
    cut = transform(Image.new("RGB", (100, 200)), (64, 64))
    assert (cut.original_size, cut.crop_top_left, tuple(cut.pixels.shape)) == ((200, 100), (32, 0), (3, 64, 64))
    # Half size: pixel (y, x) of the crop averages around twice (y + offset, x) of the original.
    half = transform(coordinates(128, 64), (32, 32))
    assert half.crop_top_left == (16, 0)
    green, red = at(half.pixels, 8, 20)
    assert abs(green - 2 * (8 + 16)) <= 1
    assert abs(red - 2 * 20) <= 1


@pytest.mark.parametrize(("height", "width"), [(33, 47), (512, 511), (7, 1000), (1000, 7), (64, 48)])
def test_the_resized_image_always_covers_the_target(height: int, width: int) -> None:
    plan = plan_crop((height, width), (64, 48))
    assert plan.resized[0] >= 64
    assert plan.resized[1] >= 48
    assert 64 in plan.resized or 48 in plan.resized


def test_flipping_mirrors_before_the_crop() -> None:
    cut = transform(coordinates(32, 101), (32, 32), flip=True)
    assert cut.flipped
    assert at(cut.pixels, 0, 0) == (0, 100 - cut.crop_top_left[1])
    assert at(cut.pixels, 0, 1) == (0, 99 - cut.crop_top_left[1])


def test_pixels_are_rgb_from_minus_one_to_one() -> None:
    image = Image.new("RGB", (2, 1), (255, 0, 0))
    image.putpixel((1, 0), (0, 0, 255))
    expected = torch.tensor([[[1.0, -1.0]], [[-1.0, -1.0]], [[-1.0, 1.0]]])
    assert to_tensor(image).dtype == torch.float32
    assert torch.equal(to_tensor(image), expected)


def test_every_mode_becomes_rgb_on_white() -> None:
    clear = Image.new("RGBA", (4, 4), (10, 20, 30, 0))
    assert decode(encoded(clear)).getpixel((0, 0)) == (255, 255, 255)
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 9, 8, 7])
    assert decode(encoded(palette)).getpixel((0, 0)) == (9, 8, 7)
    assert decode(encoded(palette, transparency=1)).getpixel((0, 0)) == (255, 255, 255)
    assert decode(encoded(palette, transparency=b"\xff\x00")).getpixel((0, 0)) == (255, 255, 255)
    assert decode(encoded(Image.new("L", (4, 4), 77))).getpixel((0, 0)) == (77, 77, 77)
    deep = Image.fromarray(np.full((4, 4), 65535 // 2, np.uint16))
    assert decode(encoded(deep)).getpixel((0, 0)) == (127, 127, 127)


def test_exif_orientation_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: width and height swap
    assert decode(encoded(Image.new("RGB", (30, 10)), "JPEG", exif=exif)).size == (10, 30)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_broken_exif_leaves_the_pixels() -> None:
    image = decode(encoded(Image.new("RGB", (30, 10)), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff"))
    assert image.size == (30, 10)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_cut_file_is_undecodable(kind: str) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    data = encoded(noise, kind)
    assert decode(data).size == (64, 64)
    with pytest.raises(UndecodableImage):
        decode(data[: len(data) // 2])


@pytest.mark.parametrize("data", [b"", b"<html>not found</html>", b"\xff\xd8\xff"])
def test_no_image_at_all(data: bytes) -> None:
    with pytest.raises(UndecodableImage) as caught:
        decode(data)
    assert "0x" not in str(caught.value)  # a memory address in the report would change from run to run


def test_buckets_of_1024_are_the_usual_sdxl_sizes() -> None:
    sizes = buckets(1024)
    assert sizes[0] == (1024, 1024)
    assert {(896, 1152), (1152, 896), (832, 1216), (768, 1344)} <= set(sizes)
    for height, width in sizes:
        assert height % 64 == width % 64 == 0
        assert 0.9 * 1024**2 <= height * width <= 1024**2
        assert max(height, width) / min(height, width) <= 2
    assert {(w, h) for h, w in sizes} == set(sizes)


def test_small_resolutions_need_a_small_step() -> None:
    assert (24, 40) in buckets(32, step=4)
    with pytest.raises(ConfigError, match="a multiple of 64 expected, such as 64"):
        buckets(40)


def test_both_images_share_the_bucket_of_their_mean_aspect() -> None:
    sizes = buckets(1024)
    assert nearest_bucket((600, 900), sizes) == (832, 1216)
    assert nearest_bucket((900, 600), sizes) == (1216, 832)
    assert pair_bucket([(512, 1024), (1024, 512)], sizes) == (1024, 1024)
    assert pair_bucket([(512, 768), (768, 1152)], sizes) == (832, 1216)
