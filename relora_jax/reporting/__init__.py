"""report.md, report.html and their pictures, runs side by side, spectra."""
