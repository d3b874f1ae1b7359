"""Callbacks: mechanisms that can be combined with any strategy, one file each."""
