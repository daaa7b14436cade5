"""A sample: what objectives, measures and kinds of task see."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from PIL import Image

from winnow.infra.io.images import ImageError, decode_image, image_extension


class Sample:
    """One sample of a pool or an evaluation set. Nothing is read or decoded before it is asked for.

    Args:
        uid: 32 hexadecimal digits, or "" where there is none.
        key: name in its tar.
        text, texts: the caption ("" where there is none), and all captions; `(text,)` by default.
        label: the class, where there is one.
        columns: pool and measured columns that were asked for, by name.
        members: the files of the sample by extension ("jpg", "wav", "npy", "2.txt"). Values are read when accessed.
        image: the decoded image, where it is already at hand.

    Example:
        >>> sample = Sample(text="a red square", members={"cls": b"3"})
        >>> sample.text, sample.member("cls"), sample.has_image
        ('a red square', b'3', False)
    """

    __slots__ = ("_image", "columns", "key", "label", "members", "text", "texts", "uid")

    def __init__(
        self,
        *,
        uid: str = "",
        key: str = "",
        text: str = "",
        texts: tuple[str, ...] | None = None,
        label: int | None = None,
        columns: Mapping[str, Any] | None = None,
        members: Mapping[str, bytes] | None = None,
        image: Image.Image | None = None,
    ) -> None:
        self.uid, self.key, self.text, self.label = uid, key, text, label
        self.texts = (text,) if texts is None else texts
        self.columns: Mapping[str, Any] = {} if columns is None else columns
        self.members: Mapping[str, bytes] = {} if members is None else members
        self._image = image

    @property
    def has_image(self) -> bool:
        """Whether it has an image, decoded or as a member, which may be undecodable."""
        return self._image is not None or image_extension(self.members) is not None

    def image(self, flatten: bool = True) -> Image.Image:
        """The image as RGB, decoded at the first call.

        Args:
            flatten: whether transparent parts become white; see `decode_image`.

        Raises:
            ImageError: there is none, or it cannot be decoded.
        """
        if self._image is None:
            ext = image_extension(self.members)
            if ext is None:
                raise ImageError("no image")
            self._image = decode_image(self.members[ext], flatten)
        return self._image

    def member(self, ext: str) -> bytes:
        """The content of a member. Raises KeyError when there is none of that extension."""
        return self.members[ext]
