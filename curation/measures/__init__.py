"""Measures: columns that are computed once per sample, so that changing a threshold recomputes nothing."""

from winnow.infra.registry import Registry

MEASURES = Registry(
    "measure",
    {
        "aesthetic": "winnow.curation.measures.aesthetic:Aesthetic",
        "caption": "winnow.curation.measures.caption:Caption",
        "caption_stats": "winnow.curation.measures.caption_stats:CaptionStats",
        "clip": "winnow.curation.measures.clip:Clip",
        "content": "winnow.curation.measures.content:Content",
        "entity": "winnow.curation.measures.entity:Entity",
        "image_hash": "winnow.curation.measures.image_hash:ImageHash",
        "language": "winnow.curation.measures.language:Language",
        "nsfw": "winnow.curation.measures.nsfw:Nsfw",
        "quality": "winnow.curation.measures.quality:Quality",
        "watermark": "winnow.curation.measures.watermark:Watermark",
    },
)
