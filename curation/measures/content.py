"""The digest of the image's file."""

from __future__ import annotations

import hashlib
from typing import ClassVar

import pyarrow as pa

from winnow.curation.measures.base import Measure, Samples
from winnow.infra.params import params


@params
class Content(Measure):
    """`content.sha256`: of the image's file in the shard, 64 hexadecimal digits."""

    name: ClassVar[str] = "content"
    version: ClassVar[int] = 1
    encoded: ClassVar[bool] = True
    summary: ClassVar[str] = "sha256 of the image's file"

    def schema(self) -> pa.Schema:
        return pa.schema([("sha256", pa.string())])

    def compute(self, samples: Samples) -> pa.Table:
        return pa.table([[hashlib.sha256(data).hexdigest() for data in samples.encoded]], schema=self.schema())
