"""report.md and its pictures, runs side by side, spectra."""
