"""The embed stage: what every encoder makes of every set."""
