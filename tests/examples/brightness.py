"""How bright an image is."""

from typing import ClassVar

import pyarrow as pa
from PIL import ImageStat

from winnow.curation.measures.base import Measure
from winnow.infra.params import params


@params
class Brightness(Measure):
    """`brightness.mean`: mean luma of the image, 0 to 255, float32."""

    name: ClassVar[str] = "brightness"
    version: ClassVar[int] = 1
    pixels: ClassVar[bool] = True
    summary: ClassVar[str] = "mean luma"

    def schema(self):
        return pa.schema([("mean", pa.float32())])

    def compute(self, samples):
        means = [None if image is None else ImageStat.Stat(image.convert("L")).mean[0] for image in samples.images]
        return pa.table([pa.array(means, pa.float32())], schema=self.schema())
