"""Sources of data, one file each, over one base."""
