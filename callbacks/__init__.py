"""Mechanisms that cut across strategies, one file each."""
