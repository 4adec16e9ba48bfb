"""The method, for anyone's model: low-rank layers, merges, resets, the schedule. Imports no other room."""
