"""Measures: columns computed once per sample and kept, so that thresholds change without computing anything again."""

from infra.registry import Registry

MEASURES = Registry(
    "measure",
    {
        "aesthetic": "curation.measures.aesthetic:Aesthetic",
        "caption": "curation.measures.caption:Caption",
        "caption_stats": "curation.measures.caption_stats:CaptionStats",
        "clip": "curation.measures.clip:Clip",
        "content": "curation.measures.content:Content",
        "entity": "curation.measures.entity:Entity",
        "image_hash": "curation.measures.image_hash:ImageHash",
        "language": "curation.measures.language:Language",
        "nsfw": "curation.measures.nsfw:Nsfw",
        "quality": "curation.measures.quality:Quality",
        "watermark": "curation.measures.watermark:Watermark",
    },
)
