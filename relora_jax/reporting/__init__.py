"""report.md, report.html and their pictures, comparisons of runs, and spectra."""
