"""The command ``thinned uncertainty``: data from a file, predictions to a file, and a report."""
