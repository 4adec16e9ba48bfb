"""Documents -> rows -> batches."""
