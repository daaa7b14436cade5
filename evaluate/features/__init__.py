"""The embed stage: the features of every set by every encoder."""
