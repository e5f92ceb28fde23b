"""All measures of one run, kept as results and shown as a page."""
