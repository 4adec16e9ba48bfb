"""Arms, rates and seeds compared: which runs a study needs, running them, and what they say."""
