"""Continual learning on PyTorch Lightning."""
