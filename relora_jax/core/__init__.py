"""The method for any NNX model: low-rank layers, merges, resets, the schedule. Imports no other package."""
