"""Data modules: one file per kind of data set, over one base class."""
