"""The state of a run and what happens to it: steps, compiled programs, sharding, optimizer, evaluation."""
