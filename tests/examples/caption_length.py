"""Keep captions of a wanted length."""

from typing import ClassVar

from winnow.curation.filters.base import Filter, numbers
from winnow.infra.params import params


@params
class CaptionLength(Filter):
    """Keep captions of at least `least` and at most `most` words."""

    most: int
    least: int = 1

    name: ClassVar[str] = "caption_length"
    paper: ClassVar[str] = "an example"

    def columns(self):
        return ("caption.words",)  # so the measure `caption` runs

    def mask(self, batch, state):
        words = numbers(batch["caption.words"])
        return (words >= self.least) & (words <= self.most)
