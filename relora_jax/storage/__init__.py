"""Atomic files and directories, locks, cache directories."""
