"""Makes timm and transformers importable where torchvision has no compiled part for this torch."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

from benchmarks.step import import_timm

import_timm()
