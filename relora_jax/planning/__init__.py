"""What a run needs on hardware that is not there: its programs, compiled for it but not run."""
