"""Pictures and HTML pages of the results of runs."""
