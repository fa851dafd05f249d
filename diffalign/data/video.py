"""Clips: which frames of a video are taken, and how they are decoded.

A clip is an animated GIF, WebP or APNG (decoded by Pillow), an mp4, webm, mkv, avi or mov file (by PyAV, the extra
`video`), or a folder with one image per frame. Only the frames that are taken are kept in memory; they are counted as
stored, so that the same file always gives the same frames.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from typing import Any

from PIL import Image, ImageSequence

from diffalign.data.images import DECODING_ERRORS, UndecodableImage, decode, reason, to_rgb, upright
from diffalign.errors import MissingExtraError

# The container format stills use, too: AVIF and HEIC are "ftyp" files, and Pillow's business.
_STILLS = (b"avif", b"avis", b"heic", b"heix", b"hevc", b"mif1", b"msf1")


class TooShort(Exception):  # noqa: N818 - what it says of the clip
    """A clip with fewer frames than are asked for, with both numbers."""


def frame_numbers(count: int, frames: int, stride: int | None = None) -> list[int]:
    """Which of a clip's frames are taken, in order.

    Args:
        count: frames of the clip.
        frames: how many are wanted.
        stride: every so manieth from the start on; None spreads them evenly from the first frame to the last.

    Raises:
        TooShort: the clip has too few.
    """
    needed = frames if stride is None else 1 + (frames - 1) * stride
    if count < needed:
        with_stride = f" ({frames} at a stride of {stride})" if stride is not None and frames > 1 else ""
        raise TooShort(f"{count} frame{'' if count == 1 else 's'}; at least {needed} needed{with_stride}")
    if frames == 1:
        return [0]
    if stride is not None:
        return [i * stride for i in range(frames)]
    # Half up, in whole numbers: nothing depends on a float's last bit.
    return [(2 * i * (count - 1) + frames - 1) // (2 * (frames - 1)) for i in range(frames)]


def decode_clip(parts: Sequence[bytes], frames: int = 1, stride: int | None = None) -> list[Image.Image]:
    """Decode `frames` frames of a clip to upright RGB of one size; one frame of a video or animation is its first.

    Args:
        parts: the bytes of one file, or of the frames of a folder, in order.
        frames, stride: see `frame_numbers`.

    Raises:
        TooShort: too few frames; a still image has one.
        UndecodableImage: not an image or video, cut short, or frames of different sizes.
        MissingExtraError: a video file, and PyAV is not installed.
    """
    if not parts:
        raise UndecodableImage("a folder without images")
    if len(parts) > 1:
        return _of_one_size([decode(parts[i]) for i in frame_numbers(len(parts), frames, stride)])
    if is_video(parts[0]):
        return _video(parts[0], frames, stride)
    return [decode(parts[0])] if frames == 1 else _animation(parts[0], frames, stride)


def is_video(data: bytes) -> bool:
    """Whether bytes are a video container, by how they begin."""
    if data[4:8] in (b"ftyp", b"moov", b"mdat", b"wide"):
        return data[8:12] not in _STILLS
    return data[:4] == b"\x1a\x45\xdf\xa3" or (data[:4] == b"RIFF" and data[8:12] == b"AVI ")


def _animation(data: bytes, frames: int, stride: int | None) -> list[Image.Image]:
    try:
        with Image.open(io.BytesIO(data)) as image:
            wanted = frame_numbers(sum(1 for _ in ImageSequence.Iterator(image)), frames, stride)
            taken = {}
            for number, frame in enumerate(ImageSequence.Iterator(image)):
                if number in wanted:
                    frame.load()
                    taken[number] = to_rgb(upright(frame.copy()))
                if number == wanted[-1]:
                    break
            return _of_one_size([taken[number] for number in wanted])
    except DECODING_ERRORS as error:
        raise UndecodableImage(reason(error)) from error


def _video(data: bytes, frames: int, stride: int | None) -> list[Image.Image]:
    try:
        import av
    except ImportError as error:
        raise MissingExtraError("av", "video", "a video file in the data") from error

    def decoded(container: Any) -> Iterator[Any]:
        container.streams.video[0].thread_type = "AUTO"
        return container.decode(video=0)  # type: ignore[no-any-return]

    try:
        # What a container says of its length is often missing, and sometimes wrong: all is decoded to count the frames,
        # but where the numbers of the frames do not depend on it.
        count = 1 + (frames - 1) * (stride or 1)
        if frames > 1 and stride is None:
            with av.open(io.BytesIO(data)) as container:
                count = sum(1 for _ in decoded(container))
        wanted = frame_numbers(count, frames, stride)
        taken, seen = {}, 0
        with av.open(io.BytesIO(data)) as container:
            for number, frame in enumerate(decoded(container)):
                seen = number + 1
                if number in wanted:
                    # Degrees counter-clockwise by which the stored picture must be turned; phones store it sideways.
                    taken[number] = frame.to_image().rotate(frame.rotation, expand=True)
                if number == wanted[-1]:
                    break
        frame_numbers(seen, frames, stride)  # refuses what ended too early
        return _of_one_size([taken[number] for number in wanted])
    except (*DECODING_ERRORS, av.FFmpegError) as error:
        raise UndecodableImage(reason(error)) from error


def _of_one_size(images: list[Image.Image]) -> list[Image.Image]:
    sizes = sorted({f"{image.height}x{image.width}" for image in images})
    if len(sizes) > 1:
        raise UndecodableImage(f"its frames have different sizes ({', '.join(sizes[:3])})")
    return images
