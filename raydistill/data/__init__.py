"""Text corpora: files and hub data sets, column detection, checks of rows, batches, and the embedded demo."""
