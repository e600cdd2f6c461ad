"""Probes, kNN and metrics of frozen backbones."""
