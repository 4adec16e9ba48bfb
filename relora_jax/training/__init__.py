"""Training state, update steps, compiled programs, sharding, optimizer and evaluation."""
