"""Networks of open_clip, timm and diffusers, their preprocessing and tokenizers."""
